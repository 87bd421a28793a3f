"""Tokenised examples: what a step needs of them, and nothing else."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from cosup.data import Example, Passage
from cosup.template import Template


class Row(NamedTuple):
    """A tokenised example; passages are named by `passage_key`.

    Args:
        id: the example's.
        group: stands for the title of its first passage; for itself where there is no passage, or none with a title.
        ids: Gen's sequence.
        labels: as long; `IGNORED` where nothing is learnt.
        ret: positions of `[Ret]`.
        gold: the passage to find at each.
        ignored: passages that are neither label nor negative, for each, ascending.
        negatives: hard negatives, for each.
    """

    id: str
    group: int
    ids: list[int]
    labels: list[int]
    ret: list[int]
    gold: list[int]
    ignored: list[list[int]]
    negatives: list[list[int]]


def row_of(example: Example, template: Template, passages: Mapping[str, Passage], *, train_on_passages: bool) -> Row:
    """Tokenises an example; see `Template.render` for what it raises."""
    rendered = template.render(example, passages, train_on_passages=train_on_passages)
    title = passages[rendered.gold[0]].title if rendered.gold else ""
    return Row(
        example.id,
        passage_key(title or example.id),
        rendered.ids,
        rendered.labels,
        rendered.ret,
        [passage_key(id) for id in rendered.gold],
        [[passage_key(id) for id in sorted(ignored)] for ignored in rendered.ignored],
        [[passage_key(id) for id in negatives] for negatives in rendered.negatives],
    )


def up_to_the_last_query(row: Row) -> Row:
    """What the queries of an example depend on; of one that retrieves nothing, its first token."""
    length = row.ret[-1] + 1 if row.ret else 1
    return row._replace(ids=row.ids[:length], labels=row.labels[:length])


def passage_key(passage: str) -> int:
    """What stands for a passage id in tensors that processes exchange: 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(passage.encode()).digest()[:8], "big") >> 1
