"""Shards: what a build has done so far, a pair of Parquet files for each thousand passages, on disk or in a store.

A shard is embedded as a whole, wherever that happens, so that its vectors do not depend on who did it or when. It is
done when its record is there, which says what it was made of and the checksums of what was made.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cosup.config import UserError
from cosup.data import Passage
from cosup.files import explained
from cosup.index.manifest import Dtype
from cosup.index.passages import to_passages, to_table
from cosup.index.protocol import Embedder, Vectors
from cosup.index.vectors import Stored, encode

SHARD = 1024  # passages, sorted by length together

_OURS = ("passages-", "plan-", "vectors-", "done-")


class ShardStore:
    """The shards of one build.

    Args:
        place: a folder, or the URI of one in an object store that Arrow reaches (`s3://`, `gs://`, `hdfs://`).

    Raises:
        UserError: there can be none at this place.
    """

    def __init__(self, place: str):
        self.place = place
        if "://" in place:
            try:
                self._fs, self._root = fs.FileSystem.from_uri(place)
                self._fs.create_dir(self._root, recursive=True)
            except (pa.ArrowException, OSError) as e:
                reason = (str(e) or type(e).__name__).splitlines()[0]
                raise UserError(f"no shards can be kept at {place} ({reason}); name another place") from e
            return
        self._fs, self._root = fs.LocalFileSystem(), str(Path(place).absolute())
        with explained(Path(self._root)):
            self._fs.create_dir(self._root, recursive=True)

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None where there is none."""
        try:
            with self._fs.open_input_file(f"{self._root}/{name}") as file:
                data: bytes = file.read()
                return data
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all: an object store does so by itself, a disk by a rename."""
        path = f"{self._root}/{name}"
        local = isinstance(self._fs, fs.LocalFileSystem)
        target = f"{path}.{os.getpid()}.part" if local else path
        with explained(Path(path)):
            with self._fs.open_output_stream(target) as stream:
                stream.write(data)
            if local:
                os.replace(target, path)

    def delete(self) -> None:
        """Removes what was written here; a folder on disk too, if it holds nothing else."""
        found = self._fs.get_file_info(fs.FileSelector(self._root))
        ours = [info for info in found if info.base_name.startswith(_OURS)]
        for info in ours:
            self._fs.delete_file(info.path)
        if len(ours) == len(found) and isinstance(self._fs, fs.LocalFileSystem):
            self._fs.delete_dir(self._root)


def plan_shards(store: ShardStore, passages: Iterable[Passage], *, fingerprint: str, dtype: Dtype) -> Iterator[int]:
    """Writes the passages of each shard, as they stream by.

    Yields:
        The count of each shard; its number is how many came before. It is done already where `is_done` says so.
    """
    stream = iter(passages)
    number = 0
    while shard := list(islice(stream, SHARD)):
        data = _parquet(to_table(shard))
        if store.read(_name("passages", number)) != data:
            store.write(_name("passages", number), data)
        store.write(f"plan-{number:06d}.json", json.dumps(_source(data, fingerprint, dtype)).encode())
        yield len(shard)
        number += 1


def is_done(store: ShardStore, number: int) -> bool:
    """Whether a shard has vectors, made of the passages that are planned now by the embedder that is asked now."""
    record, plan = store.read(f"done-{number:06d}.json"), store.read(f"plan-{number:06d}.json")
    if record is None or plan is None or json.loads(record)["source"] != json.loads(plan):
        return False
    vectors = store.read(_name("vectors", number))
    return vectors is not None and _sha(vectors) == json.loads(record)["vectors"]


def embed_shard(store: ShardStore, number: int, embedder: Embedder, *, dtype: Dtype) -> int:
    """Makes the vectors of a shard; may be done again, by anyone, with the same result. Returns how many passages."""
    data = store.read(_name("passages", number))
    assert data is not None
    passages = to_passages(pq.read_table(io.BytesIO(data)))
    vectors_PD = embedder.embed_passages(passages)
    if not np.isfinite(vectors_PD).all():
        bad = passages[int(np.flatnonzero(~np.isfinite(vectors_PD).all(1))[0])]
        raise UserError(f"the vector of passage {bad.id!r} is not finite: the model is damaged, or its training failed")
    out = _parquet(_vector_table(*encode(vectors_PD, dtype)), compression="none")  # noise does not shrink
    store.write(_name("vectors", number), out)
    record = {"source": _source(data, embedder.fingerprint, dtype), "vectors": _sha(out)}
    store.write(f"done-{number:06d}.json", json.dumps(record).encode())
    return len(passages)


def read_passages(store: ShardStore, count: int) -> Iterator[Passage]:
    """The passages of the first `count` shards."""
    for number in range(count):
        data = store.read(_name("passages", number))
        assert data is not None
        yield from to_passages(pq.read_table(io.BytesIO(data)))


def read_vectors(store: ShardStore, count: int) -> Iterator[tuple[Stored, Vectors | None]]:
    """The stored vectors and scales of the first `count` shards.

    Raises:
        UserError: one is not done, or is damaged.
    """
    for number in range(count):
        record, data = store.read(f"done-{number:06d}.json"), store.read(_name("vectors", number))
        if record is None or data is None or _sha(data) != json.loads(record)["vectors"]:
            raise UserError(f"shard {number} in {store.place} is missing or damaged; run the build again")
        yield _from_vector_table(pq.read_table(io.BytesIO(data)))


def _name(what: str, number: int) -> str:
    return f"{what}-{number:06d}.parquet"


def _source(data: bytes, fingerprint: str, dtype: Dtype) -> dict[str, str]:
    return {"passages": _sha(data), "fingerprint": fingerprint, "dtype": dtype}


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parquet(table: pa.Table, *, compression: str = "zstd") -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression)
    return sink.getvalue()


def _vector_table(stored_PD: Stored, scales_P: Vectors | None) -> pa.Table:
    flat = pa.array(np.ascontiguousarray(stored_PD).reshape(-1))
    columns: dict[str, Any] = {"vector": pa.FixedSizeListArray.from_arrays(flat, stored_PD.shape[1])}
    if scales_P is not None:
        columns["scale"] = pa.array(scales_P)
    return pa.table(columns)


def _from_vector_table(table: pa.Table) -> tuple[Stored, Vectors | None]:
    column = table["vector"].combine_chunks()
    stored_PD = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
    return stored_PD, table["scale"].to_numpy() if "scale" in table.column_names else None
