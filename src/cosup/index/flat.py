"""The exact index: a folder of memory-mapped vectors and passages, searched by FAISS without loading either.

The folder holds `index.json`, which names and describes the other files, `vectors-N.npy` and `passages-N.arrow`.
A change writes files with the next N and then replaces `index.json` in one rename, so that a reader sees the state
before or the state after, and nothing else.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from cosup.config import UserError
from cosup.data import Passage
from cosup.files import atomic_file, sha256
from cosup.index.protocol import Hit, Vectors

FORMAT_VERSION = 1


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """`index.json`: what the folder holds and what made it."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    kind: str = "flat"
    metric: str = "inner_product"
    fingerprint: str
    dim: int
    count: int
    created: str
    generation: int
    vectors: _File
    passages: _File


class FlatIndex:
    """Exact search over a folder. See `cosup.index.Index` for the methods.

    Args:
        folder: an index folder.

    Raises:
        UserError: no index there, a newer format, a damaged or truncated file (named).
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._load()

    def _load(self) -> None:
        self.manifest = _read_manifest(self.folder)
        for file in (self.manifest.vectors, self.manifest.passages):
            _check_file(self.folder / file.name, file)
        self.fingerprint, self.dim = self.manifest.fingerprint, self.manifest.dim
        self._vectors_ND = _open_vectors(self.folder / self.manifest.vectors.name)
        self._table = _open_passages(self.folder / self.manifest.passages.name)
        _check_shapes(self.folder / "index.json", self.manifest, self._vectors_ND, self._table)
        self.__dict__.pop("_rows", None)

    def __len__(self) -> int:
        return self.manifest.count

    def __iter__(self) -> Iterator[Passage]:
        return (_to_passage(row) for batch in self._table.to_batches() for row in batch.to_pylist())

    def search(self, queries_QD: Vectors, k: int, *, where: Mapping[str, Any] | None = None) -> list[list[Hit]]:
        """See `Index.search`."""
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dim:
            raise ValueError(f"queries must have shape [Q, {self.dim}], not {list(queries_QD.shape)}")
        rows = np.arange(len(self)) if where is None else self._rows_where(where)
        vectors_ND = self._vectors_ND if where is None else self._vectors_ND[rows]
        if not len(rows) or not len(queries_QD):
            return [[] for _ in queries_QD]
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        scores_QK, found_QK = faiss.knn(queries_QD, vectors_ND, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)
        ids = self._table["id"]
        return [
            [Hit(ids[int(rows[i])].as_py(), float(score)) for i, score in zip(found, scores, strict=True)]
            for found, scores in zip(found_QK, scores_QK, strict=True)
        ]

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """See `Index.get`."""
        found = self._table.take(pa.array([self._rows[id] for id in ids], pa.int64())).to_pylist()
        return [_to_passage(row) for row in found]

    def add(self, passages: Sequence[Passage], vectors_PD: Vectors) -> None:
        """See `Index.add`. Writes the folder anew: cost grows with its size."""
        if vectors_PD.shape != (len(passages), self.dim):
            raise ValueError(f"vectors must have shape [{len(passages)}, {self.dim}], not {list(vectors_PD.shape)}")
        last = {passage.id: row for row, passage in enumerate(passages)}  # of an id that comes twice
        passages, vectors_PD = [passages[row] for row in last.values()], vectors_PD[list(last.values())]
        kept = self._rows_but(set(last))
        self._rewrite(
            np.concatenate([self._vectors_ND[kept], vectors_PD]),
            pa.concat_tables([self._table.take(kept), to_table(passages)]),
        )

    def remove(self, ids: Sequence[str]) -> int:
        """See `Index.remove`. Writes the folder anew."""
        kept = self._rows_but(set(ids))
        removed = len(self) - len(kept)
        if removed:
            self._rewrite(self._vectors_ND[kept], self._table.take(kept))
        return removed

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {id: row for row, id in enumerate(self._table["id"].to_pylist())}

    def _rows_but(self, ids: set[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        gone = {self._rows[id] for id in ids if id in self._rows}
        return np.array([row for row in range(len(self)) if row not in gone], np.int64)

    def _rows_where(self, where: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        metas = map(json.loads, self._table["meta"].to_pylist())
        fits = (all(meta.get(key) == value for key, value in where.items()) for meta in metas)
        return np.flatnonzero(np.fromiter(fits, bool, len(self)))

    def _rewrite(self, vectors_ND: Vectors, table: pa.Table) -> None:
        old = self.manifest
        write_index(self.folder, vectors_ND, table, fingerprint=self.fingerprint, generation=old.generation + 1)
        for file in (old.vectors, old.passages):
            (self.folder / file.name).unlink()
        self._load()


def write_index(folder: Path, vectors_ND: Vectors, table: pa.Table, *, fingerprint: str, generation: int = 0) -> None:
    """Writes the files of one generation and then the manifest that makes them current."""
    names = f"vectors-{generation}.npy", f"passages-{generation}.arrow"
    with atomic_file(folder / names[0]) as file:
        np.save(file, vectors_ND.astype(np.float32, copy=False), allow_pickle=False)
    with atomic_file(folder / names[1]) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1 << 16)
    vectors, passages = (_describe(folder / name) for name in names)
    manifest = Manifest(
        fingerprint=fingerprint,
        dim=vectors_ND.shape[1],
        count=len(vectors_ND),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        generation=generation,
        vectors=vectors,
        passages=passages,
    )
    with atomic_file(folder / "index.json") as file:
        file.write((manifest.model_dump_json(indent=2) + "\n").encode())


def to_table(passages: Sequence[Passage]) -> pa.Table:
    """Passages as Arrow; `meta` is JSON, because its keys differ from passage to passage."""
    return pa.table(
        {
            "id": [p.id for p in passages],
            "title": [p.title for p in passages],
            "text": [p.text for p in passages],
            "meta": [json.dumps(p.meta, ensure_ascii=False) for p in passages],
        },
        schema=pa.schema([(name, pa.string()) for name in ("id", "title", "text", "meta")]),
    )


def _to_passage(row: Mapping[str, str]) -> Passage:
    return Passage(row["id"], row["text"], row["title"], json.loads(row["meta"]))


def _describe(path: Path) -> _File:
    return _File(name=path.name, bytes=path.stat().st_size, sha256=sha256(path))


def _read_manifest(folder: Path) -> Manifest:
    path = folder / "index.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {raw['format_version']}, newer than this cosup reads; upgrade cosup"
            )
        return Manifest.model_validate(raw)
    except FileNotFoundError:
        raise UserError(f"there is no index at {folder}: make one with `cosup index build`") from None
    except (ValidationError, ValueError, KeyError, TypeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} is damaged ({str(e).splitlines()[0]}); build the index again") from None


def _check_file(path: Path, file: _File) -> None:
    """Every byte is read once: a damaged offset in a mapped file could end the process."""
    actual = path.stat().st_size if path.is_file() else None
    if actual != file.bytes:
        state = "missing" if actual is None else f"{actual:,} bytes long where the manifest says {file.bytes:,}"
        raise UserError(f"{path} is {state}; build the index again")
    if sha256(path) != file.sha256:
        raise UserError(f"{path} is damaged: its checksum differs from the manifest's; build the index again")


def _check_shapes(path: Path, manifest: Manifest, vectors_ND: Vectors, table: pa.Table) -> None:
    if vectors_ND.shape != (manifest.count, manifest.dim) or len(table) != manifest.count:
        raise UserError(f"{path} is damaged: it contradicts the files that it names; build the index again")


def _open_vectors(path: Path) -> Vectors:
    try:
        vectors: Vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); build the index again") from None
    return vectors


def _open_passages(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as e:
        raise UserError(f"{path} is damaged ({e}); build the index again") from None
