"""Linear layers whose weights are laid out beforehand for products of few rows on a CPU.

Shapes: S tokens, I inputs, O outputs.

PyTorch hands a weight as it is stored to a library that wants it in blocks. Where hundreds of rows share the product
that hardly shows; for the one to thirty of a step that writes, putting it in blocks takes longer than the product.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Products = Callable[[Tensor], Sequence[Tensor]]
"""From [S, I], the outputs [S, O] of one or several linear layers."""

MOST_PACKED = 2**31
"""Bytes of a model's weights up to which they are held a second time, in blocks."""

_ROWS = 16  # that a layout is chosen for; it serves 1 to 512 as well
_TYPES = (torch.float32, torch.bfloat16)


def packs(model: nn.Module) -> bool:
    """Whether a model's linear layers are worth packing: on a CPU, of a type that can be, and not too large."""
    weights = list(model.parameters())
    fits = sum(weight.nbytes for weight in weights) <= MOST_PACKED
    on_cpu = all(weight.device.type == "cpu" and weight.dtype in _TYPES for weight in weights)
    return fits and on_cpu and _can_pack({weight.dtype for weight in weights})


def _can_pack(types: set[torch.dtype]) -> bool:
    """Whether PyTorch was built with what packs, and the processor multiplies these types."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.bfloat16 not in types or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def products(*modules: nn.Module, pack: bool) -> Products:
    """Linear layers that read the same, as one product where that can be.

    Args:
        modules: linear layers, or what stands in their place, such as adapters.
        pack: see `packs`; weights that change afterwards change nothing.
    """
    if not pack or any(type(module) is not nn.Linear for module in modules):
        return lambda x_SI: [module(x_SI) for module in modules]
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    weight_OI = torch.cat([linear.weight.detach() for linear in linears])
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _ROWS), _bias(linears)
    sizes = [linear.out_features for linear in linears]
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x_SI: multiply(x_SI, weight, bias, "none", [], "").split(sizes, -1)


def _bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    none = [linear.weight.new_zeros(linear.out_features) for linear in linears]
    biases: list[Tensor] = [
        zeros if linear.bias is None else linear.bias for linear, zeros in zip(linears, none, strict=True)
    ]
    return torch.cat(biases).detach()
