"""Passages in an Arrow file, mapped, read a batch at a time; a damaged byte is an error and never a crash.

Arrow trusts the offsets in a file that it maps. So each batch has its place and checksum in a table beside it, and is
given to Arrow only after its bytes were verified, once.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cosup.data import Passage
from cosup.files import atomic_file
from cosup.index.manifest import damaged
from cosup.index.mapped import MappedFile

COLUMNS = ("id", "title", "text", "meta")
SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])
_BATCH = 256  # passages; the unit that is verified, so that a first touch reads some 100 KB
_PLACE = np.dtype([("start", "<u8"), ("end", "<u8"), ("crc32", "<u4")])


def to_table(passages: Sequence[Passage]) -> pa.Table:
    """Passages as Arrow; `meta` is JSON, because its keys differ from passage to passage."""
    return pa.table(
        {
            "id": [p.id for p in passages],
            "title": [p.title for p in passages],
            "text": [p.text for p in passages],
            "meta": [json.dumps(p.meta, ensure_ascii=False) for p in passages],
        },
        schema=SCHEMA,
    )


def to_passages(table: pa.Table | pa.RecordBatch) -> list[Passage]:
    """The inverse of `to_table`."""
    return [_to_passage(row) for row in table.to_pylist()]


def write_passages(path: Path, places: Path, passages: Iterable[Passage]) -> None:
    """Writes passages and the table of where each batch lies; the table's last row is the file's footer."""
    stream, table = iter(passages), []
    with atomic_file(path) as file:
        sink = pa.PythonFile(file, mode="w")
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            while batch := list(islice(stream, _BATCH)):
                start = file.tell()
                writer.write_table(to_table(batch))
                table.append((start, file.tell()))
            start = file.tell()
        table.append((start, file.tell()))
    rows = [(*place, crc) for place, crc in zip(table, _crcs(path, table), strict=True)]
    with atomic_file(places) as file:
        np.save(file, np.array(rows, _PLACE), allow_pickle=False)


def _crcs(path: Path, places: Iterable[tuple[int, int]]) -> Iterator[int]:
    with path.open("rb") as file:
        for start, end in places:
            file.seek(start)
            yield zlib.crc32(file.read(end - start))


class PassageFile:
    """The passages of a segment, by row.

    Args:
        file: the Arrow file.
        places: the table of its batches.
        count: how many passages it holds.

    Raises:
        UserError: its footer is damaged.
    """

    def __init__(self, file: MappedFile, places: MappedFile, count: int):
        self._file, self._count, self._places = file, count, places.array()
        places.verify()
        batches = -(-count // _BATCH)
        if self._places.dtype != _PLACE or len(self._places) != batches + 1:
            raise damaged(places.path)
        self._verify(batches)
        self._reader = pa.ipc.open_file(pa.py_buffer(file.bytes))
        self._batch = lru_cache(maxsize=4096)(self._read)

    def __iter__(self) -> Iterator[Passage]:
        for number in range(len(self._places) - 1):
            yield from to_passages(self._batch(number))

    def id(self, row: int) -> str:
        """The id of the passage in a row."""
        id: str = self._batch(row // _BATCH)["id"][row % _BATCH].as_py()
        return id

    def get(self, row: int) -> Passage:
        """The passage in a row."""
        return to_passages(self._batch(row // _BATCH).slice(row % _BATCH, 1))[0]

    def _read(self, number: int) -> pa.RecordBatch:
        self._verify(number)
        return self._reader.get_batch(number)

    def _verify(self, number: int) -> None:
        start, end, crc = (int(value) for value in self._places[number])
        if zlib.crc32(self._file.bytes[start:end]) != crc:
            raise damaged(self._file.path)


def _to_passage(row: Mapping[str, Any]) -> Passage:
    return Passage(row["id"], row["text"], row["title"], json.loads(row["meta"]))
