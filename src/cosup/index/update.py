"""Bringing an index up to date with a corpus, and telling whether it is sound: only what changed is embedded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from cosup.config import UserError
from cosup.data import Passage
from cosup.index.folder import BUILDING, FaissIndex, drop_building, verify
from cosup.index.parts import parts_of
from cosup.index.prepare import Prepared
from cosup.index.protocol import Embedder, Index, MeasuringEmbedder, Vectors
from cosup.index.shards import ShardStore, embed_shard, is_done, plan_shards, read_vectors
from cosup.index.vectors import decode


@dataclass(frozen=True, slots=True)
class Update:
    """What `update_index` did, in passages: `described_anew` have another `meta` alone, and kept their vectors."""

    added: int
    changed: int
    described_anew: int
    removed: int
    unchanged: int


def update_index(
    index: FaissIndex,
    passages: Iterable[Passage],
    embedder: Embedder,
    *,
    remove_others: bool = True,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Update:
    """Makes an index hold a corpus, embedding only passages that are new or read differently.

    An interrupted update goes on where it was; the index changes in one step at the end.

    Args:
        index: to be changed.
        passages: the corpus as it is now.
        embedder: the one that built it.
        remove_others: whether passages that are not in the corpus go; without, they stay.
        on_progress: is told how many passages were embedded.

    Raises:
        UserError: another embedder, no passages, two passages with one id, or another process is writing.
    """
    refuse_other(index, embedder)
    with index.writing():
        return _update(index, Prepared(passages, embedder), embedder, remove_others, on_progress)


def _update(
    index: FaissIndex,
    prepared: Prepared,
    embedder: Embedder,
    remove_others: bool,
    on_progress: Callable[[int], None],
) -> Update:
    new: list[Passage] = []
    changed: list[Passage] = []
    described: list[Passage] = []
    seen: set[str] = set()
    for passage in prepared:
        seen.add(passage.id)
        known = index.get([passage.id])[0] if passage.id in index else None
        if known is None:
            new.append(passage)
        elif (known.title, known.text) != (passage.title, passage.text):
            changed.append(passage)
        elif known.meta != passage.meta:
            described.append(passage)
    if not seen:
        raise UserError("the corpus is empty: an update by it would remove everything; name a file with passages")
    gone = {passage.id for passage in index} if remove_others else {part for id in seen for part in parts_of(index, id)}
    gone -= seen
    forgotten = index.aliases.keys() - prepared.aliases.keys() if remove_others else set()
    embedded = _embed(index, [*new, *changed], embedder, on_progress)
    vectors_PD = np.concatenate([embedded, index.vectors([passage.id for passage in described])])
    index.change([*new, *changed, *described], vectors_PD, remove=gone | forgotten, aliases=prepared.aliases)
    drop_building(index.folder)
    unchanged = len(seen) - len(new) - len(changed) - len(described)
    return Update(len(new), len(changed), len(described), len(gone), unchanged)


def _embed(
    index: FaissIndex, passages: list[Passage], embedder: Embedder, on_progress: Callable[[int], None]
) -> Vectors:
    store, done, dtype = ShardStore(str(index.folder / BUILDING)), 0, index.manifest.dtype
    shards = 0
    for number, count in enumerate(plan_shards(store, passages, fingerprint=embedder.fingerprint, dtype=dtype)):
        if not is_done(store, number):
            embed_shard(store, number, embedder, dtype=dtype)
        done, shards = done + count, number + 1
        on_progress(done)
    blocks = [decode(*block) for block in read_vectors(store, shards)]
    return np.concatenate([np.zeros((0, index.dim), np.float32), *blocks])


def refuse_other(index: Index, embedder: Embedder) -> None:
    """Raises UserError, saying what differs, if the index was not built by this embedder."""
    if index.fingerprint == embedder.fingerprint and index.dim == embedder.dim:
        return
    difference = f"its fingerprint is {index.fingerprint[:12] or 'none'}, this one's is {embedder.fingerprint[:12]}"
    if index.dim != embedder.dim:
        difference = f"its vectors have {index.dim} dimensions, this one's {embedder.dim}"
    elif isinstance(index, FaissIndex) and isinstance(embedder, MeasuringEmbedder):
        layout, other = index.manifest.layout, embedder.layout
        named = [f"its {key} is {layout[key]!r}, this one's {other.get(key)!r}" for key in layout
                 if layout[key] != other.get(key)]  # fmt: skip
        difference = named[0] if named else difference
    raise UserError(
        f"the index was built by another model ({difference}); build it again with `cosup index build --model` and "
        "this model"
    )


@dataclass(frozen=True, slots=True)
class Soundness:
    """What `check_index` found.

    Args:
        files: how many files were verified.
        bytes: their size.
        sampled: how many passages were embedded again.
        least_cosine: of their vectors and the stored ones; 1 without a sample.
    """

    files: int
    bytes: int
    sampled: int = 0
    least_cosine: float = 1.0


def check_index(index: FaissIndex, embedder: Embedder | None = None, *, sample: int = 64) -> Soundness:
    """Verifies every checksum, and a sample of the vectors against the model.

    Args:
        index: to be checked.
        embedder: the one that built it; without it, only the files are verified.
        sample: how many passages it embeds again, evenly spread.

    Raises:
        UserError: a file is damaged (named), the embedder is another, or a vector is not what it makes of the passage.
    """
    files = list(verify(index))
    size = sum(file.bytes for file in files)
    if embedder is None or not len(index):
        return Soundness(len(files), size)
    refuse_other(index, embedder)
    chosen = set(np.linspace(0, len(index) - 1, min(sample, len(index))).astype(int).tolist())
    passages = [passage for number, passage in enumerate(index) if number in chosen]
    fresh_PD, stored_PD = embedder.embed_passages(passages), index.vectors([passage.id for passage in passages])
    norms_P = np.linalg.norm(fresh_PD, axis=1) * np.linalg.norm(stored_PD, axis=1)
    cosines_P = (fresh_PD * stored_PD).sum(1) / np.maximum(norms_P, 1e-30)
    worst = int(cosines_P.argmin())
    if not cosines_P[worst] >= 0.99:
        raise UserError(
            f"the vector of passage {passages[worst].id!r} has cosine {cosines_P[worst]:.4f} with what this model "
            "makes of it, where 0.99 is the least; build the index again"
        )
    return Soundness(len(files), size, len(passages), float(cosines_P[worst]))
