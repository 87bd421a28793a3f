"""Which weights a recipe trains."""

import logging
from typing import Any

from torch import nn

from cosup.config import Recipe, UserError
from cosup.model import CoSupModel
from cosup.model.lms import body_of, is_tied

logger = logging.getLogger(__name__)


def choose_trained(model: CoSupModel, recipe: Recipe) -> None:
    """Freezes what a recipe freezes, what its objective gives no gradient, and what has no adapter where LoRA is on.

    Args:
        model: as `CoSupModel.start` gave it.
        recipe: names objective, `train.freeze` and `model.lora`.

    Raises:
        UserError: nothing would be left to train.
    """
    head, embeddings = model.gen.get_output_embeddings(), body_of(model.gen).get_input_embeddings()
    parts: dict[str, nn.Module | None] = {
        "gen": model.gen,
        "emb": model.emb,
        "projection": model.projection,
        "lm_head": head,
        "embeddings": embeddings,
    }
    tied = is_tied(model.gen)
    for name in _frozen(recipe):
        if name == "lm_head" and tied:
            model.head_learns = False
        elif parts[name] is not None:
            parts[name].requires_grad_(False)  # type: ignore[union-attr]
        elif name in recipe.train.freeze:
            logger.warning("train.freeze names the projection, but the two models have one hidden size and need none")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"nothing is left to train: train.freeze is {', '.join(recipe.train.freeze)}; freeze less")


def save_activations(model: CoSupModel) -> None:
    """Turns on activation checkpointing in both models."""
    for part in (model.gen, model.emb):
        inner: Any = part.get_base_model() if hasattr(part, "get_base_model") else part
        # transformers renamed it, and warns of the old name
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _frozen(recipe: Recipe) -> list[str]:
    shared, objective = recipe.model.emb == "gen", recipe.train.objective
    frozen: list[str] = list(recipe.train.freeze)
    if objective == "ntp":
        frozen += ["projection"] if shared else ["emb", "projection"]
    if objective == "nsp":
        frozen.append("lm_head")
    if recipe.model.lora is not None and not shared:
        frozen += [part for part in ("gen", "emb") if part not in recipe.model.lora.on]
    return frozen
