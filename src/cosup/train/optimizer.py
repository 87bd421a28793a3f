"""AdamW, for bfloat16 weights too."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as adamw_step

from cosup.config import TrainSection

_TOGETHER = 1 << 24  # elements of the weights that one call steps


def adamw(parameters: Sequence[Tensor], section: TrainSection) -> torch.optim.Optimizer:
    """AdamW as a recipe asks for it; weight decay, if any, on matrices only; with masters for bfloat16 weights."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    half = any(p.dtype == torch.bfloat16 for p in parameters)
    return (MasterAdamW if half else torch.optim.AdamW)(groups, lr=section.learning_rate, fused=True)


class MasterAdamW(torch.optim.AdamW):
    """AdamW for bfloat16 weights: moments and masters in float32, rounded to the weights after each step.

    Without masters, a step smaller than a 256th of a weight would be lost. They are made in the first step, from the
    weights that the groups hold then: FSDP2 puts shards in the place of the weights that the optimiser was made with.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of AdamW on the masters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in _buckets([weight for weight in group["params"] if weight.grad is not None]):
                self._step_of(weights, group)
        return loss

    def _step_of(self, weights: Sequence[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(weight) for weight in weights]
        masters, means, squares, steps = (
            [state[name] for state in states] for name in ("master", "exp_avg", "exp_avg_sq", "step")
        )
        adamw_step(
            masters,
            _copied([weight.grad for weight in weights if weight.grad is not None]),
            means,
            squares,
            [],
            steps,
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        _copy(masters, weights)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimiser, but what was float32 stays float32."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        weights = [p for group in self.param_groups for p in group["params"]]
        for number, weight in zip(saved, weights, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[weight][name] = value.to(weight.device, copy=True)

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            master = weight.detach().float()
            state["step"] = torch.zeros((), device=weight.device)
            state |= {"master": master, "exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        return state


def _buckets(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Weights that step together: float32 gradients of all at once would be as large as the masters."""
    bucket: list[Tensor] = []
    size = 0
    for weight in weights:
        if bucket and size + weight.numel() > _TOGETHER:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += weight.numel()
    if bucket:
        yield bucket


def _copied(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in float32."""
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        return [gradient.float() for gradient in gradients]
    copies = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
    _copy(gradients, copies)
    return copies


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies tensors, rounded to the type of the targets; whole ones in few kernels: a small model waits for them."""
    if any(isinstance(target, DTensor) for target in targets):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
    else:
        torch._foreach_copy_(list(targets), list(sources))
