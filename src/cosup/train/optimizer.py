"""AdamW, for bfloat16 weights too."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cosup.config import TrainSection


def adamw(parameters: Sequence[Tensor], section: TrainSection) -> torch.optim.Optimizer:
    """AdamW as a recipe asks for it; weight decay, if any, on matrices only; with masters for bfloat16 weights."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    half = any(p.dtype == torch.bfloat16 for p in parameters)
    return (MasterAdamW if half else torch.optim.AdamW)(groups, lr=section.learning_rate, fused=True)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights: moments and masters in float32, rounded to the weights after each step.

    Without masters, a step smaller than a 256th of a weight would be lost.

    Args:
        params: as torch.optim.AdamW takes them.
        lr: learning rate.
        fused: as torch.optim.AdamW takes it.
    """

    def __init__(self, params: Any, *, lr: float, fused: bool = False):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        masters = [
            {**group, "params": [p.detach().float().requires_grad_() for p in group["params"]]}
            for group in self.param_groups
        ]
        self._inner = torch.optim.AdamW(masters, lr=lr, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of AdamW on the masters."""
        loss = closure() if closure is not None else None
        for ours, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["lr"], inner["weight_decay"] = ours["lr"], ours["weight_decay"]
        for weight, master in self._pairs():
            master.grad = None if weight.grad is None else weight.grad.float()
        self._inner.step()
        for weight, master in self._pairs():
            weight.copy_(master)
            master.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Moments, masters and groups."""
        return {
            "state": self._inner.state_dict()["state"],
            "param_groups": super().state_dict()["param_groups"],
            "masters": [master for _, master in self._pairs()],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        groups = self._inner.state_dict()["param_groups"]
        self._inner.load_state_dict({"state": state_dict["state"], "param_groups": groups})
        for (_, master), saved in zip(self._pairs(), state_dict["masters"], strict=True):
            master.copy_(saved)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [
            pair
            for ours, inner in zip(self.param_groups, self._inner.param_groups, strict=True)
            for pair in zip(ours["params"], inner["params"], strict=True)
        ]
