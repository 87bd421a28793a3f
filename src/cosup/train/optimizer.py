"""AdamW, for bfloat16 weights too."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_step

from cosup.config import TrainSection


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
            for weight in group["params"]:
                if weight.grad is not None:  # one at a time: float32 gradients of all would be as large as the masters
                    self._step_of(weight, group)
        return loss

    def _step_of(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(weight)
        assert weight.grad is not None
        adamw_step(
            [state["master"]],
            [weight.grad.float()],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        weight.copy_(state["master"])

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
