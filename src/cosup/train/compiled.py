"""The layers of both models compiled by `torch.compile`, where that pays."""

from typing import Literal

import torch

from cosup.config import UserError
from cosup.losses import several_processes
from cosup.model.core import CoSupModel
from cosup.model.lms import body_of, layers_of

Wanted = Literal["auto"] | bool
_WORTH = 50e6  # parameters: compiling takes a quarter of a minute, and smaller models are fast as they are


def compile_layers(model: CoSupModel, wanted: Wanted, *, size: int | None = None) -> bool:
    """Compiles each transformer layer in place: elementwise work is fused; weights and their names stay as they are.

    One compilation serves all layers of a model and all lengths. Attention stays outside, where it runs as ever.

    Args:
        model: on the device and in the type that it will be trained in.
        wanted: `auto` compiles models of 50 million parameters or more that train on a CPU, in one process, where
            PyTorch finds a C++ compiler: the cases in which it was measured to pay (docs/log.md).
        size: number of parameters that `auto` goes by, where the model stands for a larger one.

    Returns:
        Whether the layers are compiled.

    Raises:
        UserError: `wanted` is True, and nothing can be compiled on this machine.
    """
    if wanted is False or (wanted == "auto" and not _pays(model, size)):
        return False
    if reason := _obstacle(model.device):
        if wanted is True:
            raise UserError(f"train.compile is true, but torch.compile does not work here ({reason}): set it to false")
        return False
    for layer in {*layers_of(body_of(model.gen)), *layers_of(body_of(model.emb))}:
        layer.compile(dynamic=True)
    return True


def _pays(model: CoSupModel, size: int | None) -> bool:
    size = size or sum(p.numel() for p in model.parameters())
    return size >= _WORTH and model.device.type == "cpu" and not several_processes()


def _obstacle(device: torch.device) -> str:
    """Why nothing can be compiled here; empty where something was."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as e:  # whatever a compiler that is absent or broken raises
        return str(e).strip().partition("\n")[0]
    return ""
