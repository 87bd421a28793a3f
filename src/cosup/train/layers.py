"""The layers of both models made faster: compiled by `torch.compile` where that pays, or of fewer kernels on a GPU."""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosup.config import UserError
from cosup.losses import several_processes
from cosup.model.core import CoSupModel
from cosup.model.lms import body_of, layers_of

Wanted = Literal["auto"] | bool
_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_WORTH = 50e6  # parameters: compiling takes a quarter of a minute, and smaller models are fast as they are


def quicken(model: CoSupModel, wanted: Wanted, *, device: str, size: int | None = None) -> bool:
    """Makes the layers faster in place, in the way that was measured to pay: see `compile_layers` and `fuse_layers`.

    Args:
        model: in the type that it will be trained in.
        wanted: `train.compile`.
        device: type of the one that it will be trained on; it may be elsewhere yet.
        size: see `compile_layers`.

    Returns:
        Whether the layers are compiled.
    """
    compiled = compile_layers(model, wanted, device=device, size=size)
    if device == "cuda" and not compiled:
        fuse_layers(model)
    return compiled


def compile_layers(model: CoSupModel, wanted: Wanted, *, device: str = "cpu", size: int | None = None) -> bool:
    """Compiles each transformer layer in place: elementwise work is fused; weights and their names stay as they are.

    One compilation serves all layers of a model and all lengths. Attention stays outside, where it runs as ever.

    Args:
        model: in the type that it will be trained in.
        wanted: `auto` compiles models of 50 million parameters or more that train on a CPU, in one process, where
            PyTorch finds a C++ compiler: the cases in which it was measured to pay (docs/log.md).
        device: see `quicken`.
        size: number of parameters that `auto` goes by, where the model stands for a larger one.

    Returns:
        Whether the layers are compiled.

    Raises:
        UserError: `wanted` is True, and nothing can be compiled on this machine.
    """
    if wanted is False or (wanted == "auto" and not _pays(model, device, size)):
        return False
    if reason := _obstacle(device):
        if wanted is True:
            raise UserError(f"train.compile is true, but torch.compile does not work here ({reason}): set it to false")
        return False
    for layer in {*layers_of(body_of(model.gen)), *layers_of(body_of(model.emb))}:
        layer.compile(dynamic=True)
    return True


def _pays(model: CoSupModel, device: str, size: int | None) -> bool:
    size = size or sum(p.numel() for p in model.parameters())
    return size >= _WORTH and device == "cpu" and not several_processes()


def _obstacle(device: str) -> str:
    """Why nothing can be compiled here; empty where something was."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as e:  # whatever a compiler that is absent or broken raises
        return str(e).strip().partition("\n")[0]
    return ""


def fuse_layers(model: CoSupModel) -> int:
    """Lets norms and adapters compute the same with fewer kernels, in place; weights and their names stay as they are.

    A small model's step on a GPU takes as long as its thousands of kernels take to be launched (docs/log.md).

    Args:
        model: that trains.

    Returns:
        How many modules were changed.
    """
    changed = 0
    for part in (model.gen, model.emb):
        for module in part.modules():
            own: Any = _rms_norm if type(module).__name__ in _RMS_NORMS else _adapted if _is_plain(module) else None
            if own is not None and "forward" not in vars(module):  # weights may be shared
                module.forward = partial(own, module)
                changed += 1
    return changed


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer with one LoRA adapter, and nothing else that peft can do."""
    if not (hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), nn.Linear)):
        return False
    adapters: Any = module
    (name, *others) = adapters.active_adapters
    plain = isinstance(adapters.lora_dropout[name], nn.Identity) and adapters.lora_B[name].bias is None
    return plain and not others and not adapters.lora_variant and not adapters.merged


def _adapted(module: Any, x: Tensor) -> Tensor:
    (name,) = module.active_adapters
    out: Tensor = module.base_layer(x)
    low: Tensor = module.lora_A[name](x)
    added = torch.addmm(
        out.flatten(0, -2), low.flatten(0, -2), module.lora_B[name].weight.T, alpha=module.scaling[name]
    )
    return added.view_as(out)
