"""Loading the other models that an evaluation may ask: of NLI, and of MAUVE."""

from typing import Any

import torch
from safetensors import SafetensorError

from cosup.config import UserError
from cosup.model.lms import hub_within_reach


def load_part(kind: Any, name: str, *, role: str, **options: Any) -> Any:
    """What `kind.from_pretrained` gives: a configuration, or a tokenizer.

    Args:
        kind: a class of transformers.
        name: of a model, or its folder.
        role: what the model is for, to begin a message with.
        options: passed on.

    Raises:
        UserError: it can't be loaded.
    """
    try:
        with hub_within_reach():
            return kind.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(
            f"{role} {name} can't be loaded ({str(e).strip().splitlines()[0]}); name a folder, or a model of Hugging "
            "Face, whose weights are safetensors"
        ) from None


def load_weights(kind: Any, name: str, *, role: str) -> Any:
    """A model in evaluation mode, on a GPU where there is one; from safetensors only, never from a pickle."""
    model = load_part(kind, name, role=role, use_safetensors=True).eval()
    return model.to("cuda") if torch.cuda.is_available() else model
