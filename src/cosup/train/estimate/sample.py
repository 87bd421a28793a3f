"""Batches that an estimate follows from: the first of the run, or, where its data can't be read, one of full length."""

from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import torch

from cosup.config import Recipe, UserError
from cosup.model import Batch, tokens_of
from cosup.model.lms import load_tokenizer
from cosup.template import Template, TemplateSettings, with_control_tokens
from cosup.train.collate import Collator, NeighbourSampler
from cosup.train.tokenized import TrainingData, load_data

SAMPLED = 24
"""Batches looked at."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Batches of a recipe, as one process gets them.

    Args:
        batches: the first of the run, or one of assumed lengths.
        examples: how many there are to train on; None where the data could not be read.
        assumed: why the lengths are assumed; empty where they are real.
    """

    batches: list[Batch]
    examples: int | None
    assumed: str = ""

    @property
    def largest(self) -> Batch:
        """The batch with the most tokens."""
        return max(self.batches, key=tokens_of)

    @property
    def tokens(self) -> float:
        """Mean number of tokens in a batch."""
        return fmean(map(tokens_of, self.batches))


def first_batches(recipe: Recipe, data: TrainingData, *, processes: int = 1, count: int = SAMPLED) -> list[Batch]:
    """The first `count` batches of a run, as one of `processes` gets them."""
    share = recipe.train.batch_size // processes
    order = iter(NeighbourSampler(data.examples.groups(), size=recipe.train.neighbours, seed=recipe.seed))
    collate = Collator(data.sequences, recipe.train)
    batches: list[Batch] = []
    while len(batches) < count and (rows := list(islice(order, share))):
        batches.append(collate([data.examples[row] for row in rows]))
    return batches[:-1] if 1 < len(batches) < count else batches  # the last may be a short one


def sample_of(recipe: Recipe, processes: int) -> Sample:
    """The first batches of a run; of assumed lengths where its data can't be read."""
    try:
        template = _template(recipe)
        data = load_data(recipe, template)
    except UserError as e:
        return Sample([_assumed(recipe, recipe.train.batch_size // processes)], None, f"full lengths, because {e}")
    return Sample(first_batches(recipe, data, processes=processes), len(data.examples))


def _template(recipe: Recipe) -> Template:
    settings = TemplateSettings(max_passage_tokens=recipe.data.max_passage_tokens)
    tokenizer = load_tokenizer(recipe.model.gen, part="gen")
    with_control_tokens(tokenizer, settings)
    other = recipe.model.emb not in (None, "gen")
    return Template(
        tokenizer, load_tokenizer(str(recipe.model.emb), part="emb") if other else tokenizer, settings=settings
    )


def _assumed(recipe: Recipe, examples: int) -> Batch:
    """A batch in which every sequence is as long as the recipe allows, and cites one passage of its own."""
    section, length = recipe.data, recipe.data.max_tokens
    asking = max(length - section.max_passage_tokens, 1)  # up to the [Ret] before its passage
    if recipe.train.objective == "nsp":
        length = asking
    labelled = length - 1 if recipe.train.train_on_passages else max(length - section.max_passage_tokens, 1)
    batch: Batch = {"gen_ids": torch.zeros(examples * length, dtype=torch.long), "gen_lengths": [length] * examples}
    if recipe.train.objective != "nsp":
        places = torch.arange(examples * length).view(examples, length)[:, :labelled].flatten()
        batch["label_positions"], batch["labels"] = places, torch.zeros(len(places), dtype=torch.long)
    if recipe.train.objective == "separate":
        batch["query_ids"] = torch.zeros(examples * asking, dtype=torch.long)
        batch["query_lengths"] = [asking] * examples
    if recipe.train.objective != "ntp":
        batch["ret_positions"] = torch.arange(examples) * (asking if recipe.train.objective == "separate" else length)
        batch["emb_ids"] = torch.zeros(examples * section.max_passage_tokens, dtype=torch.long)
        batch["emb_lengths"] = [section.max_passage_tokens] * examples
        batch["candidates"] = batch["gold"] = torch.arange(examples)
        batch["ignored"] = torch.zeros((2, 0), dtype=torch.long)
    return batch
