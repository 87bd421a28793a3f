"""Embedding shards on a Ray cluster: an actor pool of Ray Data, each actor with an embedder of its own.

Only the numbers of shards travel through Ray; passages and vectors go between the actors and the store, as Parquet.
A shard that is embedded twice, because its actor died, is written twice alike.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from cosup.config import UserError
from cosup.index.manifest import Dtype
from cosup.index.protocol import EmbedderFactory
from cosup.index.shards import ShardStore, embed_shard

_RETRIES = 3  # Ray's own default is to go on for ever


def embed_shards(
    place: str, waiting: Sequence[int], factory: EmbedderFactory, *, dtype: Dtype, workers: int
) -> Iterator[int]:
    """Embeds shards, in any order, on the cluster that Ray is connected to, or on this machine.

    Args:
        place: of the shards, where every machine reaches it.
        waiting: numbers of shards.
        factory: makes a worker's embedder; picklable.
        dtype: how vectors are stored.
        workers: actors.

    Yields:
        How many passages each shard had that is done.

    Raises:
        UserError: Ray is not installed, or a shard failed even when tried again; what is done is kept.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("the engine ray is not installed: run `pip install 'cosup[ray]'`") from None
    if not waiting:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the caller has one
    shards = ray.data.from_items([{"shard": number} for number in waiting], override_num_blocks=len(waiting))
    gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():  # up to 2.64, Ray has no other way to say how often an actor is restarted
        warnings.simplefilter("ignore", DeprecationWarning)
        done = shards.map_batches(
            _Worker,
            fn_constructor_args=(place, factory, dtype),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if gpus >= workers else None,
            max_restarts=_RETRIES,
            max_task_retries=_RETRIES,
        )
    try:
        for row in done.iter_rows():
            yield int(row["count"])
    except ray.exceptions.RayError as e:
        reason = str(e).strip().splitlines()[-1]
        raise UserError(
            f"embedding on Ray failed ({reason}); mend that and run this again: "
            "it goes on from the shards that are done"
        ) from e


class _Worker:
    def __init__(self, place: str, factory: EmbedderFactory, dtype: Dtype):
        self._store, self._dtype = ShardStore(place), dtype
        self._embedder = factory(0)  # an actor sees no GPU but its own

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        counts = [embed_shard(self._store, int(shard), self._embedder, dtype=self._dtype) for shard in batch["shard"]]
        return {"count": counts}
