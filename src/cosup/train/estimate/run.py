"""What a run will need, and the tables that tell it."""

import os
from dataclasses import dataclass

from cosup.config import Recipe, UserError
from cosup.model import CoSupModel
from cosup.train.estimate.memory import Memory, expected_memory
from cosup.train.estimate.sample import SAMPLED, Sample, first_batches, sample_of
from cosup.train.estimate.sketches import bytes_of
from cosup.train.estimate.timing import seconds_of_step, untimed_because
from cosup.train.tokenized import TrainingData

_GB = 1e9


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will need.

    Args:
        recipe: the run.
        sample: what it follows from.
        memory: at the peak of the largest batch of the sample.
        step_seconds: of a step of mean size, on this machine; None where `untimed` says why not.
        untimed: why no time is given.
        processes: that share a step.
    """

    recipe: Recipe
    sample: Sample
    memory: Memory
    step_seconds: float | None
    untimed: str
    processes: int

    @property
    def steps(self) -> int | None:
        """How many steps the run has; None where the data could not be read and no limit says it."""
        section = self.recipe.train
        return section.max_steps if self.sample.examples is None else section.steps(self.sample.examples)

    @property
    def minutes(self) -> float | None:
        """Of the whole run, loading and saving left aside."""
        if self.step_seconds is None or self.steps is None:
            return None
        minutes = self.steps * self.step_seconds / 60
        return min(minutes, self.recipe.train.max_minutes or minutes)

    def table(self) -> dict[str, str]:
        """Names and values to show."""
        memory = self.memory
        parts = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimiser": memory.optimizer,
            "activations": memory.activations,
            "program and data": memory.program,
        }
        lengths = (
            f"assumed: {self.sample.assumed}" if self.sample.assumed else f"{len(self.sample.batches)} batches read"
        )
        rows = {
            "a step": f"{self.sample.tokens:,.0f} tokens in each of {self.processes} processes ({lengths})",
            **{name: f"{size / _GB:.2f} GB" for name, size in parts.items() if size},
            "peak memory": f"{memory.peak / _GB:.2f} GB a process",
        }
        if self.processes > 1:
            rows["with FSDP"] = f"{memory.sharded(self.processes) / _GB:.2f} GB a process"
        rows["time a step"] = self.untimed or f"{self.step_seconds:.2f} s, on this machine"
        rows["steps"] = "unknown without the data" if self.steps is None else f"{self.steps:,}"
        rows["time in all"] = "unknown" if self.minutes is None else f"{self.minutes:,.0f} minutes"
        return rows


def estimate_run(recipe: Recipe, *, processes: int | None = None) -> Estimate:
    """Estimates memory and time of a run, without its weights; data that can't be read is assumed to be of full length.

    Args:
        recipe: the run.
        processes: that will share each step; as this process was launched without it.

    Raises:
        UserError: a model's configuration can't be read, or processes can't share a step equally.
    """
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.train.batch_size % processes:
        raise UserError(
            f"train.batch_size is {recipe.train.batch_size}, which {processes} processes can't share equally"
        )
    sample = sample_of(recipe, processes)
    memory = expected_memory(recipe, sample.largest)
    seconds, untimed = None, untimed_because(recipe)
    if not untimed:
        seconds = seconds_of_step(recipe, sample)
    return Estimate(recipe, sample, memory, seconds, untimed, processes)


def expectations(recipe: Recipe, model: CoSupModel, data: TrainingData) -> dict[str, str]:
    """Rows of the table at the start of a run: what is trained, what is frozen, tokens, steps and memory; no time.

    Args:
        recipe: the run.
        model: that is loaded, and will be trained.
        data: that was read.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batches = first_batches(recipe, data, processes=processes, count=SAMPLED // 3)
    sample = Sample(batches, len(data.examples))
    memory = expected_memory(recipe, sample.largest, loaded=bytes_of(model.parameters()))
    steps = Estimate(recipe, sample, memory, None, "", processes).steps
    assert steps is not None
    tokens = sample.tokens * processes
    trained, frozen = _parts(model, trained=True), _parts(model, trained=False)
    return {
        "trained": ", ".join(trained),
        **({"frozen": ", ".join(frozen)} if frozen else {}),
        "tokens": f"about {tokens:,.0f} a step, {tokens * steps / 1e6:,.1f} million in all",
        "steps": f"{steps:,}" + (" at most" if recipe.train.max_minutes else ""),
        "memory": f"about {memory.peak / _GB:.1f} GB expected at the peak of a process",
    }


def _parts(model: CoSupModel, *, trained: bool) -> list[str]:
    """Each part's number of parameters that are trained, or that are not; what two parts share counts once."""
    counted: set[int] = set()
    found = []
    for name, part in model.named_children():
        own = [p for p in part.parameters() if id(p) not in counted]
        counted |= {id(p) for p in own}
        if numbers := sum(p.numel() for p in own if p.requires_grad is trained):
            found.append(f"{name} {numbers / 1e6:,.1f}M")
    return found
