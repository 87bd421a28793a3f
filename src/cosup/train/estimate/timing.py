"""Seconds of a step on this machine: those of cut models with random weights, extrapolated to all layers."""

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from cosup.config import Recipe
from cosup.model import Batch, CoSupModel, chunks, compute_dtype, tokens_of
from cosup.train.estimate.sample import Sample
from cosup.train.estimate.sketches import CUT, local_device, moved_to, size_of, sketched, whole_depth
from cosup.train.layers import quicken
from cosup.train.optimizer import adamw
from cosup.train.step import backward_in_chunks, objective_loss

_TIMED_TOKENS = 2048  # of a step that is timed; a larger one is timed in part
_REPEATS = 3
_SMALL = 500e6  # weights of models that are timed as they are
_BYTES_TRAINED = 20  # of a bfloat16 weight with all that its training needs; a float32 one takes 16


def seconds_of_step(recipe: Recipe, sample: Sample) -> float:
    """Seconds of a step of mean size on this machine."""
    batch = min(sample.batches, key=lambda batch: abs(tokens_of(batch) - sample.tokens))
    timed = moved_to(_within(batch, _TIMED_TOKENS), local_device())
    scale = sample.tokens / tokens_of(timed)
    model = sketched(recipe, layers=_timed_layers(recipe), device=local_device())
    quicken(model, recipe.train.compile, device=local_device(), size=size_of(recipe))
    updates = _updates(model, recipe)

    def passes(model: CoSupModel) -> float:
        return _seconds_of(lambda: _forward_and_backward(model, recipe, timed))

    return scale * whole_depth(recipe, model, passes) + updates


def untimed_because(recipe: Recipe) -> str:
    """Why a step is not timed here; empty where it can be."""
    if recipe.train.dtype == "bfloat16" and compute_dtype("auto", local_device()) != torch.bfloat16:
        return "not measured: the recipe computes in bfloat16, which this CPU can only imitate"
    cut = sketched(recipe, layers=_timed_layers(recipe), device="meta")
    need = _BYTES_TRAINED * sum(p.numel() for p in cut.parameters())
    free = torch.cuda.mem_get_info()[0] if local_device() == "cuda" else psutil.virtual_memory().available
    if need < free * 0.8:
        return ""
    return f"not measured: a few layers alone need {need / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free here"


def _timed_layers(recipe: Recipe) -> int | None:
    """How many layers a model that is timed keeps: all where it is small, and few where they are large."""
    whole, one, two = (size_of(recipe, n) for n in (None, 1, 2))
    if whole < _SMALL:
        return None
    return CUT if two - one < 40e6 else 2


def _within(batch: Batch, tokens: int) -> Batch:
    """The batch, or as much of it as has at most so many tokens, whole sequences of Gen and of Emb_seq alike."""
    if tokens_of(batch) <= tokens:
        return batch
    count = max(1, len(batch["gen_lengths"]) * tokens // tokens_of(batch))
    part = chunks(batch, count, count=1)[0]
    if "gold" in batch:
        kept = len(part["emb_lengths"])
        part["candidates"] = torch.arange(kept)
        part["gold"] = torch.arange(len(part["ret_positions"])) % kept
        part["ignored"] = torch.zeros((2, 0), dtype=torch.long)
    return part


def _forward_and_backward(model: CoSupModel, recipe: Recipe, batch: Batch) -> None:
    section = recipe.train
    objective: dict[str, Any] = {
        "objective": section.objective,
        "lambda_": section.lambda_,
        "temperature": recipe.model.temperature,
    }
    model.zero_grad()
    if section.chunk_size is not None:
        backward_in_chunks(model, batch, size=section.chunk_size, **objective)
    else:
        objective_loss(model(batch), batch, **objective)[0].backward()


def _updates(model: CoSupModel, recipe: Recipe) -> float:
    """Seconds of clipping and of the optimiser's step over the whole models."""
    whole = sketched(recipe, layers=None, device="meta")
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer = adamw(trained, recipe.train)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, recipe.train.max_grad_norm)
        optimizer.step()

    seconds = _seconds_of(update)
    model.zero_grad()
    return seconds * sum(p.numel() for p in whole.parameters() if p.requires_grad) / sum(p.numel() for p in trained)


def _seconds_of(work: Callable[[], None]) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        work()
        if local_device() == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # other work on the machine only adds
