"""Models with the shapes of a recipe's, whole or cut, and what follows from a few layers for all of them."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from cosup.config import Recipe
from cosup.model import Batch, CoSupModel, compute_dtype, sketch
from cosup.model.lms import body_of, keep_layers
from cosup.train.parts import choose_trained, save_activations

CUT = 4
"""Layers of a cut model."""


def local_device() -> str:
    """What this machine computes on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def bytes_of(tensors: Any) -> int:
    """Their size."""
    return sum(t.numel() * t.element_size() for t in tensors)


def sketched(recipe: Recipe, *, layers: int | None, device: str) -> CoSupModel:
    """The model that a recipe trains, with random weights, or none on the device `meta`; `layers`: of each part."""
    separate = recipe.train.objective == "separate"
    model = sketch(recipe.model, layers=layers, device=device, retriever=separate)
    choose_trained(model, recipe)
    if recipe.train.activation_checkpointing:
        save_activations(model)
    return model.to(compute_dtype(recipe.train.dtype, local_device())).train()


def size_of(recipe: Recipe, layers: int | None = None) -> int:
    """Parameters of both models, or of as many of their layers."""
    return sum(p.numel() for p in sketch(recipe.model, layers=layers).parameters())


def whole_depth(recipe: Recipe, deep: CoSupModel, measure: Callable[[CoSupModel], float]) -> float:
    """A figure of the whole models, from those of cut ones, as it grows by the same amount with each layer.

    Args:
        recipe: the run.
        deep: of several layers; afterwards it has one in each part.
        measure: the figure of a model.
    """
    whole = sketched(recipe, layers=None, device="meta")
    parts = ("gen",) if whole.settings.emb_is_gen else ("gen", "emb")
    figure = total = measure(deep)
    for part in parts:
        layers, kept = _depth(getattr(whole, part)), _depth(getattr(deep, part))
        if layers > kept:
            less = measure(cut(deep, part))
            total += (figure - less) / (kept - 1) * (layers - kept)
            figure = less
    return total


def cut(model: CoSupModel, part: str) -> CoSupModel:
    """The model with one layer left in one part."""
    keep_layers(body_of(getattr(model, part)), 1)
    return model


def _depth(part: Any) -> int:
    return int(body_of(part).config.num_hidden_layers)


def moved_to(batch: Batch, device: str) -> Batch:
    """The batch on another device."""
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return cast(Batch, moved)
