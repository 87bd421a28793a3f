"""What a build would take, without doing it."""

import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cosup.config import UserError
from cosup.data import Passage
from cosup.index.ann import choose
from cosup.index.build import disk_needed
from cosup.index.manifest import Dtype
from cosup.index.passages import to_table
from cosup.index.protocol import Embedder, MeasuringEmbedder

_SAMPLE = 256


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a build is expected to take.

    Args:
        passages: counted.
        tokens: of all of them, from a sample; None where the embedder can't count.
        seconds: of embedding with one worker, from embedding a part of the sample.
        disk: bytes needed while it runs, and `free` how many there are.
        kind: of the index.
    """

    passages: int
    tokens: int | None
    seconds: float
    disk: int
    free: int
    kind: str


def estimate_build(
    passages: Iterable[Passage], embedder: Embedder, out: Path, *, kind: str = "auto", dtype: Dtype = "float32",
    embedded: int = 32,
) -> Estimate:  # fmt: skip
    """Reads all passages, and measures and embeds a sample of them.

    Args:
        passages: the corpus.
        embedder: the model.
        out: where the index would be.
        kind: see `build_index`.
        dtype: see `build_index`.
        embedded: how many passages are embedded to take the time.

    Raises:
        UserError: there are no passages.
    """
    sample, count = _sample(passages)
    if not count:
        raise UserError("the corpus is empty: name a file with at least one passage")
    tokens = None
    if isinstance(embedder, MeasuringEmbedder):
        tokens = round(sum(embedder.count_tokens(sample)) / len(sample) * count)
    timed = sample[:embedded]
    embedder.embed_passages(timed[:2])  # what is only done once is not counted
    start = time.perf_counter()
    embedder.embed_passages(timed)
    seconds = (time.perf_counter() - start) / len(timed) * count
    disk = disk_needed(count, embedder.dim, dtype, text_bytes=to_table(sample).nbytes // len(sample))
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    return Estimate(count, tokens, seconds, disk, shutil.disk_usage(place).free, choose(kind, count))


def _sample(passages: Iterable[Passage]) -> tuple[list[Passage], int]:
    """A uniform sample in one pass, the same each time, in random order."""
    chance, sample, count = random.Random(0), list[Passage](), 0
    for count, passage in enumerate(passages, start=1):
        if len(sample) < _SAMPLE:
            sample.append(passage)
        elif (place := chance.randrange(count)) < _SAMPLE:
            sample[place] = passage
    chance.shuffle(sample)
    return sample, count
