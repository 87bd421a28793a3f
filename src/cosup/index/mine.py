"""Hard negatives: passages that the current model takes for right, and that are not.

Source: ANCE (Xiong et al. 2021) for mining with the model itself; NV-Retriever (Moreira et al. 2024) for keeping off
what scores as high as the gold, which is often right too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cosup.config import UserError
from cosup.data import Evidence, Example, Passage
from cosup.index.parts import parts_of, whole_of
from cosup.index.prepare import normalised
from cosup.index.protocol import Index, Vectors

QueryMaker = Callable[[Sequence[Example]], Sequence[Vectors]]
"""The retrieval states of each example, [K, D], one for each retrieval: Gen's, at `[Ret]`, in its own context."""


@dataclass(frozen=True)
class Rules:
    """Which passages are hard negatives.

    Args:
        count: most negatives of a retrieval.
        ranks: from the first rank, 1, to the last that is looked at; the nearest are often right without being gold.
        margin: a negative scores at least so much less than the gold; None for no such rule.
    """

    count: int = 8
    ranks: tuple[int, int] = (1, 100)
    margin: float | None = 0.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"the number of negatives is {self.count}, and must be 1 or more")
        if not 1 <= self.ranks[0] <= self.ranks[1]:
            raise UserError(f"the ranks are {self.ranks[0]} to {self.ranks[1]}, and must rise from 1 or more")


@dataclass
class Mined:
    """Counts: retrievals, negatives found, and retrievals for which none was left."""

    retrievals: int = 0
    negatives: int = 0
    without: int = 0


def mine(
    examples: Iterable[Example],
    index: Index,
    queries_of: QueryMaker,
    *,
    rules: Rules | None = None,
    counts: Mined | None = None,
    batch: int = 64,
) -> Iterator[Example]:
    """Examples with the negatives that an index finds for each retrieval, in the place of those they had.

    Left out are the golds of the response, `also`, and passages that say the same as one of these. Of a passage that
    the index holds in parts, the whole is the negative: files of passages know no parts.

    Args:
        examples: of training.
        index: built by the current model.
        queries_of: the current model.
        rules: rank window, margin, number.
        counts: filled while examples are made.
        batch: examples whose queries are made together.

    Raises:
        UserError: an example cites a passage that the index does not hold.
    """
    rules, counts = rules or Rules(), counts if counts is not None else Mined()
    for group in _groups(examples, batch):
        for example, queries_KD in zip(group, queries_of(group), strict=True):
            yield _mined(example, queries_KD, index, rules, counts)


def _mined(example: Example, queries_KD: Vectors, index: Index, rules: Rules, counts: Mined) -> Example:
    golds = [part.passage for part in example.evidence]
    if not golds:
        return example
    assert len(queries_KD) == len(golds)
    right = set(golds).union(*(part.also for part in example.evidence))
    right |= {part for id in right for part in parts_of(index, id)}
    depth = rules.ranks[1] + len(right)
    found = index.search(queries_KD, depth)
    said = {normalised(passage) for passage in _known(index, sorted(right), golds, example.id)}
    golds_KD = index.vectors(golds)
    mined = []
    for query_D, gold_D, hits in zip(queries_KD, golds_KD, found, strict=True):
        limit = np.inf if rules.margin is None else float(query_D @ gold_D) - rules.margin
        window = [hit for hit in hits if hit.id not in right][rules.ranks[0] - 1 : rules.ranks[1]]
        fitting = [hit.id for hit in window if hit.score <= limit]
        texts = index.get(fitting[: 2 * rules.count + len(right)])
        others = dict.fromkeys(whole_of(passage) for passage in texts if normalised(passage) not in said)
        negatives = tuple(others)[: rules.count]
        mined.append(negatives)
        counts.retrievals += 1
        counts.negatives += len(negatives)
        counts.without += not negatives
    parts = iter(mined)
    return replace(
        example,
        response=tuple(
            replace(part, negatives=next(parts)) if isinstance(part, Evidence) else part for part in example.response
        ),
    )


def _known(index: Index, ids: Sequence[str], golds: Sequence[str], example: str) -> Iterator[Passage]:
    for id in ids:
        try:
            yield from index.get([id])
        except KeyError:
            if id in golds:
                raise UserError(
                    f"example {example!r} cites passage {id!r}, which the index does not hold; "
                    "build it from all passages"
                ) from None


def _groups(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        group.append(example)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
