"""Training data: read from the files of a recipe, rendered, and packed into batches.

Shapes: S packed tokens, K retrieval positions, N candidates, I ignored pairs.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

import torch
from torch.utils.data import Dataset, Sampler

from cosup.config import Recipe, TrainSection, UserError
from cosup.data import Example, Passage, kind_of, read_examples, read_passages, read_questions
from cosup.data.convert import convert
from cosup.losses import NOBODY
from cosup.model import Batch, pack
from cosup.template import Rendered, Template


class Collator:
    """Renders examples and packs them into one step's `Batch`.

    Args:
        template: the model's.
        passages: by id, all that the examples cite.
        section: the recipe's `train`.
    """

    def __init__(self, template: Template, passages: Mapping[str, Passage], section: TrainSection):
        self.template, self.passages, self.section = template, passages, section

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """The batch of these examples."""
        rows = [self.render(example) for example in examples]
        batch = pack(rows, labels=self.section.objective != "nsp")
        batch["example_ids"] = [example.id for example in examples]
        if self.section.objective != "ntp":
            self._add_candidates(batch, rows)
        return batch

    def render(self, example: Example) -> Rendered:
        """The training sequence of one example."""
        return self.template.render(example, self.passages, train_on_passages=self.section.train_on_passages)

    def _add_candidates(self, batch: Batch, rows: list[Rendered]) -> None:
        """The distinct passages of these examples, golds first, and who may not count which as a negative."""
        gold = [passage for row in rows for passage in row.gold]
        hard = [n for row in rows for negatives in row.negatives for n in negatives[: self.section.negatives]]
        distinct = list(dict.fromkeys([*gold, *hard]))
        sequences = [self._embedded(passage) for passage in distinct]
        # without a passage, Emb_seq still runs, for nothing: every process needs a gradient of every weight
        sequences = sequences or [[self.template.emb_tokenizer.eos_token_id or 0]]
        keys = [passage_key(passage) for passage in distinct] or [NOBODY]
        starts = accumulate((len(row.ids) for row in rows), initial=0)
        positions = [start + t for start, row in zip(starts, rows, strict=False) for t in row.ret]
        pairs = [(k, p) for k, ignored in enumerate(i for row in rows for i in row.ignored) for p in sorted(ignored)]
        batch["ret_positions"] = torch.tensor(positions, dtype=torch.long)
        batch["emb_ids"] = torch.tensor([i for sequence in sequences for i in sequence])
        batch["emb_lengths"] = [len(sequence) for sequence in sequences]
        batch["candidates"] = torch.tensor(keys)
        batch["gold"] = torch.tensor([passage_key(passage) for passage in gold], dtype=torch.long)
        batch["ignored"] = torch.tensor([[k, passage_key(p)] for k, p in pairs], dtype=torch.long).reshape(-1, 2).T

    def _embedded(self, passage: str) -> list[int]:
        return self.template.embedded(self.passages[passage], max_tokens=self.template.settings.max_passage_tokens)


def passage_key(passage: str) -> int:
    """What stands for a passage id in tensors that processes exchange: 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(passage.encode()).digest()[:8], "big") >> 1


class ExampleDataset(Dataset[Example]):
    """Examples in memory; they are rendered when a batch needs them."""

    def __init__(self, examples: Sequence[Example]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row: int) -> Example:
        return self._examples[row]


class NeighbourSampler(Sampler[int]):
    """Random order in which examples whose first passages share a title come in groups.

    A batch of 16 with groups of 4 holds passages on the same subject, which are the hardest negatives, and still
    passages on others. Groups are drawn anew in each epoch.

    Args:
        titles: of each example's first passage; examples without a passage have one of their own.
        size: of a group; 1 is plain shuffling.
        seed: with the epoch, decides the order.
    """

    def __init__(self, titles: Sequence[str], *, size: int, seed: int):
        self._titles, self._size, self._seed, self._epoch = titles, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._titles)

    def __iter__(self) -> Iterator[int]:
        rng = Random(f"{self._seed} {self._epoch}")
        by_title: dict[str, list[int]] = defaultdict(list)
        for row in rng.sample(range(len(self)), len(self)):
            by_title[self._titles[row]].append(row)
        groups = [rows[i : i + self._size] for rows in by_title.values() for i in range(0, len(rows), self._size)]
        rng.shuffle(groups)
        return (row for group in groups for row in group)


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a recipe's `data` names, read and checked.

    Args:
        examples: those that fit.
        passages: by id.
        left_out: how many questions or examples were not used, by reason.
        dev: examples to judge by.
    """

    examples: list[Example]
    passages: dict[str, Passage]
    left_out: Counter[str]
    dev: list[Example]

    def titles(self) -> list[str]:
        """Title of each example's first passage; its own id where there is no passage, or none with a title."""
        firsts = [example.evidence[0].passage if example.evidence else "" for example in self.examples]
        named = [self.passages[first].title if first else "" for first in firsts]
        return [title or example.id for title, example in zip(named, self.examples, strict=True)]


def load_data(recipe: Recipe, template: Template) -> TrainingData:
    """Reads the training data of a recipe.

    Raises:
        UserError: a file is missing or malformed, a citation leads nowhere, or nothing is left to train on.
    """
    section = recipe.data
    passages = {p.id: p for p in read_passages(*map(section.resolve, section.passages))}
    titles = {p.id: p.title for p in passages.values()}
    left_out: Counter[str] = Counter()

    def usable(paths: Sequence[Path]) -> list[Example]:
        examples: list[Example] = []
        for path in map(section.resolve, paths):
            if kind_of(path) == "questions":
                examples += convert(read_questions(path), passages=passages, titles=titles, left_out=left_out)
            else:
                examples += read_examples(path)
        if section.only_with_retrieval:
            left_out["retrieves nothing"] += sum(not example.evidence for example in examples)
            examples = [example for example in examples if example.evidence]
        fitting = [example for example in examples if _fits(example, passages, template, section.max_tokens)]
        left_out["longer than data.max_tokens"] += len(examples) - len(fitting)
        return fitting

    examples, dev = usable(section.train), usable(section.dev)
    left_out += Counter()  # drops what is zero
    if not examples:
        raise UserError(f"there is nothing to train on: {dict(left_out) or 'the files hold no examples'}")
    return TrainingData(examples, passages, left_out, dev)


def _fits(example: Example, passages: Mapping[str, Passage], template: Template, limit: int) -> bool:
    """Whether the rendered example has at most `limit` tokens; short ones are not rendered to find out."""
    room = sum(len(part.claim.encode()) + template.settings.max_passage_tokens + 3 for part in example.evidence)
    if room + len(example.question.encode()) + 64 <= limit and len(example.evidence) == len(example.response):
        return True
    return len(template.render(example, passages).ids) <= limit
