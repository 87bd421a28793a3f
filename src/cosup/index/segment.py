"""A segment: passages that were written together, in files that never change.

`vectors` (and `scales` for int8), `passages` with `places`, `ids` and `meta` to look rows up by, and `faiss` where the
search is approximate. The names end in the generation that wrote them.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cosup.data import Passage
from cosup.index import ann
from cosup.index.lookup import Lookup, id_key, meta_keys, write_lookup
from cosup.index.manifest import FileEntry, SegmentEntry, describe
from cosup.index.mapped import MappedFile
from cosup.index.passages import PassageFile, write_passages
from cosup.index.protocol import Rows, Vectors
from cosup.index.vectors import Stored, VectorFile, write_array

log = logging.getLogger(__name__)

_SUFFIXES = {
    "vectors": ".npy",
    "scales": ".npy",
    "passages": ".arrow",
    "places": ".npy",
    "ids": ".npy",
    "meta": ".npy",
    "faiss": ".faiss",
}


class Segment:
    """A segment, mapped.

    Args:
        folder: the index folder.
        entry: the segment in the manifest.
        dim: D.
    """

    def __init__(self, folder: Path, entry: SegmentEntry, dim: int):
        files = {role: MappedFile(folder, file) for role, file in entry.files.items()}
        self.count, self._entry = entry.count, entry
        self.vectors = VectorFile(files["vectors"], files.get("scales"), shape=(entry.count, dim))
        self.passages = PassageFile(files["passages"], files["places"], entry.count)
        self._ids, self._meta = Lookup(files["ids"]), Lookup(files["meta"])
        self._ann = ann.AnnFile(files["faiss"], self.vectors) if "faiss" in files else None

    def row(self, id: str) -> int | None:
        """The row that has an id; None where none does."""
        rows = (int(row) for row in self._ids.rows(id_key(id)))
        return next((row for row in rows if row < self.count and self.passages.id(row) == id), None)

    def rows_where(self, where: Mapping[str, Any]) -> Rows:
        """The rows whose `meta` has these values, ascending."""
        rows_P = np.arange(self.count)
        for key in meta_keys(where):
            rows_P = np.intersect1d(rows_P, self._meta.rows(key), assume_unique=True)
        return rows_P[rows_P < self.count]

    def nearest(self, queries_QD: Vectors, k: int, rows_P: Rows | None) -> tuple[Vectors, Rows]:
        """The k best rows, among `rows_P` where given: by FAISS where there is a structure and it finds enough.

        A restriction to few rows is searched exactly, which is quicker than a structure that must skip most.
        """
        available = self.count if rows_P is None else len(rows_P)
        if self._ann is not None and available > max(self.count // 50, 1000):
            result = self._ann.nearest(queries_QD, k, self._entry.effort, self._entry.candidates, rows_P)
            if result is not None and result[1].shape[1] >= min(k, available) and (result[1] >= 0).all():
                return result
        return self.vectors.nearest(queries_QD, k, rows_P)


def write_segment(
    folder: Path,
    generation: int,
    passages: Callable[[], Iterable[Passage]],
    vectors: Callable[[], Iterator[tuple[Stored, Vectors | None]]],
    *,
    count: int,
) -> SegmentEntry:
    """Writes the files of a segment, `faiss` excepted, without holding them in memory.

    Args:
        folder: the index folder.
        generation: the number in the names.
        passages: gives all of them, from the start, whenever called.
        vectors: gives blocks of stored vectors and scales, likewise.
        count: how many there are.
    """
    paths = {role: folder / f"{role}-{generation}{suffix}" for role, suffix in _SUFFIXES.items()}
    roles = ["vectors", "passages", "places", "ids", "meta"]
    write_array(paths["vectors"], (block for block, _ in vectors()), count=count)
    if next(vectors())[1] is not None:
        roles.append("scales")
        write_array(paths["scales"], (scales for _, scales in vectors() if scales is not None), count=count)
    write_passages(paths["passages"], paths["places"], passages())
    write_lookup(paths["ids"], ((id_key(p.id), row) for row, p in enumerate(passages())))
    write_lookup(paths["meta"], ((key, row) for row, p in enumerate(passages()) for key in meta_keys(p.meta)))
    return SegmentEntry(count=count, files={role: describe(paths[role]) for role in sorted(roles)})


def add_structure(
    folder: Path, generation: int, entry: SegmentEntry, dim: int, *, kind: str, graph_threads: int
) -> SegmentEntry:
    """Builds the segment's FAISS structure. Returns the entry with it and with the effort that it needs."""
    path = folder / f"faiss-{generation}{_SUFFIXES['faiss']}"
    segment = Segment(folder, entry, dim)
    ann.build(path, segment.vectors, dim, kind=kind, graph_threads=graph_threads)
    file: FileEntry = describe(path)
    effort, candidates, recall = ann.AnnFile(MappedFile(folder, file), segment.vectors).calibrate()
    if recall < ann.PROMISED:
        advice = "`hnsw` may find more, and `flat` finds all"
        log.warning("kind %s finds %.0f %% of the ten nearest of its own vectors; %s", kind, 100 * recall, advice)
    update = {"effort": effort, "candidates": candidates, "recall": round(recall, 4)}
    return entry.model_copy(update={"files": {**entry.files, "faiss": file}, **update})
