"""An index in a folder: memory-mapped, searched by FAISS, changed without its readers noticing before it is done.

The folder holds `index.json` and the files that it names; `history.jsonl`, a line for each change; `lock`, held by
whoever writes; and `building`, while a build is under way.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from cosup.config import UserError
from cosup.data import Passage
from cosup.files import atomic_file, explained
from cosup.index.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    SegmentEntry,
    check_fully,
    check_quickly,
    describe,
    read_manifest,
    write_manifest,
)
from cosup.index.mapped import MappedFile
from cosup.index.parts import parts_of, renamed, settled
from cosup.index.prepare import normalised
from cosup.index.protocol import Hit, Rows, Vectors
from cosup.index.segment import Segment, add_structure, write_segment
from cosup.index.vectors import best, encode

BUILDING = "building"
_ATTEMPTS = 10  # of opening while others change the folder
_BLOCK = 1 << 14  # rows copied at a time


class FaissIndex:
    """An index folder. See `cosup.index.Index` for the methods that every index has.

    Args:
        folder: written by `build_index`.

    Attributes:
        folder: where it is.
        manifest: what it holds.

    Raises:
        UserError: no index there, another format version, a damaged or truncated file (named).
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._lock = _lock_of(self.folder)
        self._open()

    def _open(self) -> None:
        for attempt in range(_ATTEMPTS):
            manifest = read_manifest(self.folder)
            try:
                self._map(manifest)
                return
            except (UserError, FileNotFoundError):
                # a writer may have removed what this manifest named; then there is a newer one
                if attempt + 1 == _ATTEMPTS or read_manifest(self.folder).generation == manifest.generation:
                    raise

    def _map(self, manifest: Manifest) -> None:
        for file in manifest.files():
            check_quickly(self.folder, file)
        self.manifest = manifest
        self.fingerprint, self.dim = manifest.fingerprint, manifest.dim
        self._segments = [Segment(self.folder, entry, manifest.dim) for entry in manifest.segments]
        self._starts = np.cumsum([0, *(segment.count for segment in self._segments)])
        self._removed = _read_removed(self.folder, manifest.removed)
        self._aliases = _read_aliases(self.folder, manifest.aliases)
        if int(self._starts[-1]) - len(self._removed) != manifest.count:
            raise UserError(f"{self.folder / MANIFEST} contradicts the files that it names; build the index again")

    def __len__(self) -> int:
        return self.manifest.count

    def __iter__(self) -> Iterator[Passage]:
        removed = set(self._removed.tolist())
        for start, segment in zip(self._starts, self._segments, strict=False):
            yield from (p for row, p in enumerate(segment.passages, start=int(start)) if row not in removed)

    def search(self, queries_QD: Vectors, k: int, *, where: Mapping[str, Any] | None = None) -> list[list[Hit]]:
        """See `Index.search`."""
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dim:
            raise ValueError(f"queries must have shape [Q, {self.dim}], not {list(queries_QD.shape)}")
        queries_QD = np.ascontiguousarray(queries_QD, np.float32)
        if not len(queries_QD) or k < 1:
            return [[] for _ in queries_QD]
        found = (self._nearest(number, queries_QD, k, where) for number in range(len(self._segments)))
        parts = [part for part in found if part is not None]
        if not parts:
            return [[] for _ in queries_QD]
        scores_QK, rows_QK = parts[0]
        if len(parts) > 1:
            scores_QK, rows_QK = best(np.hstack([s for s, _ in parts]), np.hstack([r for _, r in parts]), k)
        return [
            [Hit(self._id(row), score) for row, score in zip(rows, scores, strict=True)]
            for rows, scores in zip(rows_QK.tolist(), scores_QK.tolist(), strict=True)
        ]

    def _nearest(
        self, number: int, queries_QD: Vectors, k: int, where: Mapping[str, Any] | None
    ) -> tuple[Vectors, Rows] | None:
        segment, removed = self._segments[number], self._removed_of(number)
        if where is not None:
            rows_P = np.setdiff1d(segment.rows_where(where), removed, assume_unique=True)
            found = segment.nearest(queries_QD, k, rows_P) if len(rows_P) else None
        else:
            found = _nearest_alive(segment, queries_QD, k, removed)
        return None if found is None else (found[0], found[1] + int(self._starts[number]))

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """See `Index.get`; the id of a duplicate gives the passage that stands for it."""
        return [self._passage(self._row(id)) for id in ids]

    def vectors(self, ids: Sequence[str]) -> Vectors:
        """See `Index.vectors`."""
        return self._vectors_of([self._row(id) for id in ids])

    def __contains__(self, id: str) -> bool:
        return self._find(id) is not None

    @property
    def aliases(self) -> Mapping[str, str]:
        """Ids of duplicates, with the id of the passage that stands for each."""
        return self._aliases

    def add(self, passages: Sequence[Passage], vectors_PD: Vectors) -> None:
        """See `Index.add`. Writes a new segment: cost grows with what is added; `compact` joins segments."""
        ids = {passage.id for passage in passages}
        with self.writing():
            old_parts = {part for id in ids for part in parts_of(self, id)} - ids
            self.change(passages, vectors_PD, remove=old_parts)

    def remove(self, ids: Sequence[str]) -> int:
        """See `Index.remove`. The rows are left out of searches until `compact` drops them."""
        with self.writing():
            everything = {*ids, *(part for id in ids for part in parts_of(self, id))}
            return self.change([], np.zeros((0, self.dim), np.float32), remove=everything)

    def change(
        self,
        passages: Sequence[Passage],
        vectors_PD: Vectors,
        *,
        remove: Iterable[str] = (),
        aliases: Mapping[str, str] | None = None,
    ) -> int:
        """Adds and removes in one step; a duplicate takes the place of the passage that stood for it, if that goes.

        Args:
            passages: to add, each in the place of the one that has its id.
            vectors_PD: float32 [P, D].
            remove: ids, of duplicates too; those that are not there are passed over.
            aliases: ids of further duplicates, and the ids that stand for them.

        Returns:
            How many of `remove` were there.

        Raises:
            UserError: another process is writing, or the disk is full; the index is as it was.
        """
        if vectors_PD.shape != (len(passages), self.dim):
            raise ValueError(f"vectors must have shape [{len(passages)}, {self.dim}], not {list(vectors_PD.shape)}")
        last = {passage.id: place for place, passage in enumerate(passages)}  # of an id that comes twice
        new = {id: (passages[place], vectors_PD[place]) for id, place in last.items()}
        with self.writing():
            gone = {id for id in set(remove) - set(new) if id in self or id in self._aliases}
            replaced = {id for id in new if id in self}
            lost = {id for id in self._aliases.values() if id in gone or (id in new and self._differs(new[id][0]))}
            known, heirs = settled(self._aliases, lost=lost, taken={*new, *gone}, new=aliases or {})
            if not new and not gone and known == self._aliases:
                return 0
            inherited = dict(self._under_new_ids(heirs))
            dead = {row for row in map(self._find, gone | replaced) if row is not None}
            self._commit(list((new | inherited).values()), dead, known)
        self._note("changed", added=len(new) - len(replaced), replaced=len(replaced), removed=len(gone))
        return len(gone)

    def _differs(self, passage: Passage) -> bool:
        return normalised(self.get([passage.id])[0]) != normalised(passage)

    def _under_new_ids(self, heirs: Mapping[str, str]) -> Iterator[tuple[str, tuple[Passage, Vectors]]]:
        for old, new in heirs.items():
            for id in (old, *parts_of(self, old)):
                passage = renamed(self.get([id])[0], old, new)
                yield passage.id, (passage, self.vectors([id])[0])

    def _commit(self, new: list[tuple[Passage, Vectors]], dead: set[int], aliases: Mapping[str, str]) -> None:
        generation = self.manifest.generation + 1
        segments = list(self.manifest.segments)
        if new:
            passages = [passage for passage, _ in new]
            stored = encode(np.stack([vector_D for _, vector_D in new]).astype(np.float32), self.manifest.dtype)
            segments.append(
                write_segment(self.folder, generation, lambda: passages, lambda: iter([stored]), count=len(passages))
            )
        rows = np.union1d(self._removed, np.array(sorted(dead), np.int64)).astype(np.int64)
        self._publish(segments, generation, removed=rows, aliases=aliases)

    def compact(self, *, kind: str | None = None, graph_threads: int = 1) -> None:
        """Writes all segments as one, without the rows that were removed, and builds its FAISS structure anew.

        Args:
            kind: another kind than before.
            graph_threads: see `build_index`.

        Raises:
            UserError: as `change`.
        """
        from cosup.index.ann import choose

        with self.writing():
            chosen = choose(kind or self.manifest.kind, len(self))
            generation, alive = self.manifest.generation + 1, self._alive()
            segments = []
            if len(alive):
                entry = write_segment(
                    self.folder, generation, self.__iter__, lambda: self._stored(alive), count=len(alive)
                )
                if chosen != "flat":
                    entry = add_structure(
                        self.folder, generation, entry, self.dim, kind=chosen, graph_threads=graph_threads
                    )
                segments.append(entry)
            self._publish(segments, generation, removed=np.zeros(0, np.int64), aliases=self._aliases, kind=chosen)
        self._note("compacted", passages=len(self))

    def history(self) -> list[dict[str, Any]]:
        """What happened to the folder, oldest first: `time`, `what`, and details."""
        path = self.folder / "history.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines]

    def _publish(
        self,
        segments: list[SegmentEntry],
        generation: int,
        *,
        removed: Rows,
        aliases: Mapping[str, str],
        kind: str | None = None,
    ) -> None:
        old = self.manifest
        entry = None
        if len(removed):
            path = self.folder / f"removed-{generation}.npy"
            with atomic_file(path) as file:
                np.save(file, removed, allow_pickle=False)
            entry = describe(path)
        count = sum(segment.count for segment in segments) - len(removed)
        update = {
            "segments": segments,
            "generation": generation,
            "removed": entry,
            "count": count,
            "aliases": write_aliases(self.folder, generation, aliases),
            "kind": kind or old.kind,
        }
        publish(self.folder, old.model_copy(update=update))
        self._open()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other writers out, and starts from what the last one left; may be nested. Raises as `writing`."""
        if self._lock.is_locked:
            yield
            return
        with writing(self.folder, self._lock):
            self._open()
            yield

    def _note(self, what: str, **details: Any) -> None:
        note(self.folder, what, generation=self.manifest.generation, **details)

    def _row(self, id: str) -> int:
        row = self._find(self._aliases.get(id, id))
        if row is None:
            raise KeyError(id)
        return row

    def _find(self, id: str) -> int | None:
        """The row of an id, in the newest segment that has it."""
        for number in reversed(range(len(self._segments))):
            row = self._segments[number].row(id)
            if row is not None:
                row += int(self._starts[number])
                place = int(self._removed.searchsorted(row))
                gone = place < len(self._removed) and int(self._removed[place]) == row
                return None if gone else row
        return None

    def _place(self, row: int) -> tuple[Segment, int]:
        number = int(self._starts.searchsorted(row, side="right")) - 1 if len(self._segments) > 1 else 0
        return self._segments[number], row - int(self._starts[number])

    def _id(self, row: int) -> str:
        segment, inner = self._place(row)
        return segment.passages.id(inner)

    def _passage(self, row: int) -> Passage:
        segment, inner = self._place(row)
        return segment.passages.get(inner)

    def _vectors_of(self, rows: Sequence[int]) -> Vectors:
        out_PD = np.empty((len(rows), self.dim), np.float32)
        for place, row in enumerate(rows):
            segment, inner = self._place(row)
            out_PD[place] = segment.vectors.rows(np.array([inner]))[0]
        return out_PD

    def _removed_of(self, number: int) -> Rows:
        start, end = self._starts[number], self._starts[number + 1]
        inside: Rows = self._removed[self._removed.searchsorted(start) : self._removed.searchsorted(end)] - start
        return inside

    def _alive(self) -> Rows:
        return np.setdiff1d(np.arange(int(self._starts[-1])), self._removed, assume_unique=True)

    def _stored(self, alive: Rows) -> Iterator[tuple[Any, Vectors | None]]:
        """The stored vectors of rows, ascending, a block at a time, as they are: encoding twice would lose twice."""
        for number, segment in enumerate(self._segments):
            start, end = self._starts[number], self._starts[number + 1]
            inside = alive[alive.searchsorted(start) : alive.searchsorted(end)] - start
            for first in range(0, len(inside), _BLOCK):
                yield segment.vectors.stored(inside[first : first + _BLOCK])


def _nearest_alive(segment: Segment, queries_QD: Vectors, k: int, removed: Rows) -> tuple[Vectors, Rows] | None:
    """Asks for more than k, and drops what was removed, until k are left: restricting the search would cost more."""
    target = min(k, segment.count - len(removed))
    if target == 0:
        return None
    extra = min(len(removed), k + 16)
    while True:
        scores_QK, rows_QK = segment.nearest(queries_QD, min(k + extra, segment.count), None)
        if not len(removed):
            return scores_QK, rows_QK
        dead_QK = np.isin(rows_QK, removed)
        if (~dead_QK).sum(1).min() >= target:
            order = np.argsort(dead_QK, axis=1, kind="stable")[:, :target]
            return np.take_along_axis(scores_QK, order, 1), np.take_along_axis(rows_QK, order, 1)
        extra *= 4


def publish(folder: Path, manifest: Manifest) -> None:
    """Makes a state current, and removes the files that no state needs any more. To be called while `writing`."""
    write_manifest(folder, manifest)
    clean(folder, manifest)


def clean(folder: Path, manifest: Manifest) -> None:
    """Removes what an earlier state, or a change that was killed, left behind. To be called while `writing`."""
    named = {file.name for file in manifest.files()} | {MANIFEST, "history.jsonl", "lock", BUILDING}
    for path in folder.iterdir():
        if path.name not in named and (path.suffix in (".npy", ".arrow", ".faiss", ".json") or path.name[0] == "."):
            path.unlink()


def _lock_of(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder / "lock", timeout=0)


@contextmanager
def writing(folder: Path, lock: filelock.BaseFileLock | None = None) -> Iterator[None]:
    """Keeps other writers of a folder out; the system lets go of it when this process ends, however it ends.

    Args:
        folder: made where it is not there.
        lock: the one to hold; a new one without it.

    Raises:
        UserError: another writer is at work.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock or _lock_of(folder)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(f"another process is writing to {folder}; wait for it to end, and run this again") from None
    try:
        yield
    finally:
        lock.release()


def note(folder: Path, what: str, **details: Any) -> None:
    """Adds a line to `history.jsonl`: when, and what happened."""
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, **details}
    with (folder / "history.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def verify(index: FaissIndex) -> Iterator[FileEntry]:
    """Verifies every byte of every file, and yields each that is sound. Raises UserError naming one that is not."""
    for file in index.manifest.files():
        check_fully(index.folder, file)
        yield file


def write_aliases(folder: Path, generation: int, aliases: Mapping[str, str]) -> FileEntry | None:
    """Writes which ids are duplicates of which; nothing where none are."""
    if not aliases:
        return None
    path = folder / f"aliases-{generation}.json"
    with atomic_file(path) as file:
        file.write(json.dumps(aliases, ensure_ascii=False, indent=0).encode())
    return describe(path)


def _read_removed(folder: Path, entry: FileEntry | None) -> Rows:
    if entry is None:
        return np.zeros(0, np.int64)
    file = MappedFile(folder, entry)
    file.verify()
    removed: Rows = file.array().astype(np.int64)
    return removed


def _read_aliases(folder: Path, entry: FileEntry | None) -> dict[str, str]:
    if entry is None:
        return {}
    file = MappedFile(folder, entry)
    file.verify()
    aliases: dict[str, str] = json.loads(bytes(file.bytes))
    return aliases


def drop_building(folder: Path) -> None:
    """Removes the shards of a build that is finished."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
