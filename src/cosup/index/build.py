"""Building an index: passages go in, an embedder turns them into vectors, a whole folder comes out."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from cosup.config import UserError
from cosup.data import Passage
from cosup.files import atomic_folder
from cosup.index.flat import FlatIndex, to_table, write_index
from cosup.index.protocol import Embedder

_SHARD = 1024  # passages sorted by length together


def build_index(
    passages: Iterable[Passage],
    embedder: Embedder,
    out: Path,
    *,
    on_progress: Callable[[int], None] = lambda done: None,
) -> FlatIndex:
    """Embeds passages and writes an exact index; whole or not at all, in the place of what was there.

    Args:
        passages: with distinct ids.
        embedder: the model.
        out: the index folder.
        on_progress: is told how many passages are done.

    Raises:
        UserError: there are no passages, one is too long for the model, or the disk is full.
    """
    vectors, tables, done = [], [], 0
    seen: set[str] = set()
    with atomic_folder(out, marker="index.json") as folder:
        for shard in _shards(passages):
            _refuse_repeated(shard, seen)
            vectors.append(embedder.embed_passages(shard))
            tables.append(to_table(shard))
            done += len(shard)
            on_progress(done)
        if not done:
            raise UserError("the corpus is empty: name a file with at least one passage")
        write_index(folder, np.concatenate(vectors), pa.concat_tables(tables), fingerprint=embedder.fingerprint)
    return FlatIndex(out)


def _refuse_repeated(shard: list[Passage], seen: set[str]) -> None:
    for passage in shard:
        if passage.id in seen:
            raise UserError(f"two passages have the id {passage.id!r}; ids must be distinct")
        seen.add(passage.id)


def _shards(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    stream = iter(passages)
    while shard := list(islice(stream, _SHARD)):
        yield shard
