"""Embedding shards in several processes of this machine, each with an embedder of its own."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cosup.config import UserError
from cosup.index.manifest import Dtype
from cosup.index.protocol import Embedder, EmbedderFactory
from cosup.index.shards import ShardStore, embed_shard

_embedder: Embedder  # of this process, made by `_start`


def embed_shards(
    place: str, waiting: Sequence[int], factory: EmbedderFactory, *, dtype: Dtype, workers: int
) -> Iterator[int]:
    """Embeds shards, in any order.

    Yields:
        How many passages each shard had that is done.

    Raises:
        UserError: a process died; what the others finished is kept.
    """
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")  # a fork would share what torch and FAISS hold
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(numbers, factory)) as pool:
        futures = [pool.submit(_embed, place, shard, dtype) for shard in waiting]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a process that embeds passages died, perhaps for want of memory; run this again with fewer workers: "
                "it goes on from the shards that are done"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start(numbers: Any, factory: EmbedderFactory) -> None:
    global _embedder
    _embedder = factory(numbers.get())


def _embed(place: str, shard: int, dtype: Dtype) -> int:
    return embed_shard(ShardStore(place), shard, _embedder, dtype=dtype)
