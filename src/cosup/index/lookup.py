"""From a key to the rows that have it, without reading more than a few pages of a mapped file.

A lookup is a sorted `.npy` array of (64-bit hash of the key, row). Ids are looked up in one; the values of `meta` in
another, so that a filter reads no JSON.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cosup.files import atomic_file
from cosup.index.manifest import damaged
from cosup.index.mapped import MappedFile
from cosup.index.protocol import Rows

_ENTRY = np.dtype([("key", "<u8"), ("row", "<u4")])


def id_key(id: str) -> int:
    """The key of a passage's id."""
    return _hash("i" + id)


def meta_keys(meta: Mapping[str, Any]) -> list[int]:
    """The key of each value of a `meta`: equal as JSON is equal, whether 1 or 1.0, whatever the order of keys."""
    return [_hash("m" + json.dumps([key, _plain(value)], sort_keys=True)) for key, value in meta.items()]


def write_lookup(path: Path, pairs: Iterable[tuple[int, int]]) -> None:
    """Writes (key, row) pairs, sorted."""
    entries = np.fromiter(pairs, dtype=_ENTRY)
    with atomic_file(path) as file:
        np.save(file, np.sort(entries, order=("key", "row")), allow_pickle=False)


class Lookup:
    """A lookup file, mapped; its checksum is verified when it is first asked.

    Args:
        file: written by `write_lookup`.
    """

    def __init__(self, file: MappedFile):
        self._file, self._entries = file, file.array()
        if self._entries.dtype != _ENTRY or self._entries.ndim != 1:
            raise damaged(file.path)
        self._keys = self._entries["key"]

    def rows(self, key: int) -> Rows:
        """The rows that have the key, ascending."""
        self._file.verify()
        value = np.uint64(key)
        found = self._entries[self._keys.searchsorted(value) : self._keys.searchsorted(value, side="right")]
        return found["row"].astype(np.int64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _plain(value: Any) -> Any:
    """A value in which equal numbers look alike."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
