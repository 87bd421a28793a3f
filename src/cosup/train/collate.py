"""Batches of tokenised examples, and their order.

Shapes: S packed tokens, K retrieval positions, N candidates, I ignored pairs.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import accumulate
from random import Random

import torch
from torch.utils.data import Sampler

from cosup.config import TrainSection
from cosup.data import Example, Passage
from cosup.losses import NOBODY
from cosup.model import Batch, pack
from cosup.template import Template
from cosup.train.rows import Row, passage_key, row_of, up_to_the_last_query


class Collator:
    """Packs tokenised examples into one step's `Batch`.

    Args:
        passages: ids that Emb_seq reads, by `passage_key`, of all that the examples cite.
        section: the recipe's `train`.
    """

    def __init__(self, passages: Mapping[int, Sequence[int]], section: TrainSection):
        self.passages, self.section = passages, section

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """The batch of these examples."""
        objective = self.section.objective
        asking = [up_to_the_last_query(row) for row in rows] if objective in ("nsp", "separate") else rows
        batch = pack(asking if objective == "nsp" else rows, labels=objective != "nsp")
        batch["example_ids"] = [row.id for row in rows]
        if objective == "separate":
            asked = pack(asking, labels=False)
            batch["query_ids"], batch["query_lengths"] = asked["gen_ids"], asked["gen_lengths"]
        if objective != "ntp":
            self._add_candidates(batch, asking)
        return batch

    def _add_candidates(self, batch: Batch, rows: Sequence[Row]) -> None:
        """The distinct passages of these examples, golds first, and who may not count which as a negative."""
        gold = [key for row in rows for key in row.gold]
        hard = [n for row in rows for negatives in row.negatives for n in negatives[: self.section.negatives]]
        distinct = list(dict.fromkeys([*gold, *hard]))
        # without a passage, Emb_seq still runs, for nothing: every process needs a gradient of every weight
        sequences = [self.passages[key] for key in distinct] or [[0]]
        starts = accumulate((len(row.ids) for row in rows), initial=0)
        positions = [start + t for start, row in zip(starts, rows, strict=False) for t in row.ret]
        pairs = [(k, p) for k, ignored in enumerate(i for row in rows for i in row.ignored) for p in ignored]
        batch["ret_positions"] = torch.tensor(positions, dtype=torch.long)
        batch["emb_ids"] = torch.tensor([i for sequence in sequences for i in sequence])
        batch["emb_lengths"] = [len(sequence) for sequence in sequences]
        batch["candidates"] = torch.tensor(distinct or [NOBODY])
        batch["gold"] = torch.tensor(gold, dtype=torch.long)
        batch["ignored"] = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T


def collate(
    template: Template, examples: Sequence[Example], passages: Mapping[str, Passage], section: TrainSection
) -> Batch:
    """The batch of examples that are not tokenised yet.

    Args:
        template: the model's.
        examples: at least one.
        passages: by id, all that they cite.
        section: the recipe's `train`.
    """
    rows = [row_of(example, template, passages, train_on_passages=section.train_on_passages) for example in examples]
    cited = [n for example in examples for part in example.evidence for n in (part.passage, *part.negatives)]
    limit = template.settings.max_passage_tokens
    read = {passage_key(id): template.embedded(passages[id], max_tokens=limit) for id in cited if id in passages}
    return Collator(read, section)(rows)


class NeighbourSampler(Sampler[int]):
    """Random order in which examples whose first passages share a title come in groups.

    A batch of 16 with groups of 4 holds passages on the same subject, which are the hardest negatives, and still
    passages on others. Groups are drawn anew in each epoch.

    Args:
        groups: what stands for the title of each example's first passage; see `cosup.train.rows.Row`.
        size: of a group; 1 is plain shuffling.
        seed: with the epoch, decides the order.
    """

    def __init__(self, groups: Sequence[Hashable], *, size: int, seed: int):
        self._groups, self._size, self._seed, self._epoch = groups, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[int]:
        rng = Random(f"{self._seed} {self._epoch}")
        by_title: dict[Hashable, list[int]] = defaultdict(list)
        for row in rng.sample(range(len(self)), len(self)):
            by_title[self._groups[row]].append(row)
        groups = [rows[i : i + self._size] for rows in by_title.values() for i in range(0, len(rows), self._size)]
        rng.shuffle(groups)
        return (row for group in groups for row in group)
