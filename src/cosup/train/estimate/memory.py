"""Peak memory, counted on the meta device: models there have shapes and no weights, and nothing is allocated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AttentionInterface

from cosup.config import Recipe
from cosup.model import Batch, CoSupModel, chunk_count, chunks, tokens_of
from cosup.model.lms import body_of
from cosup.train.estimate.sketches import CUT, bytes_of, cut, local_device, moved_to, sketched, whole_depth


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process at the peak of a step.

    Args:
        weights: of both models, trained or not.
        gradients: of what is trained.
        optimizer: moments, and float32 masters of bfloat16 weights.
        activations: kept by the forward pass for the backward pass.
        program: Python, its libraries and the data; on a GPU nothing of it counts.
        masters: float32 copies of the gradients, while the optimiser steps on masters.
        chunked: whether gradients of earlier chunks are there beside the activations of the last.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    program: int = 0
    masters: int = 0
    chunked: bool = False

    @property
    def peak(self) -> int:
        """The most that is there at once: the end of the forward pass, or the optimiser's step."""
        forward = self.activations + (self.gradients if self.chunked else 0)
        return self.program + self.weights + self.optimizer + max(forward, self.gradients + self.masters)

    def sharded(self, processes: int) -> int:
        """The peak where weights, gradients and optimiser state are spread over processes."""
        state = {name: getattr(self, name) // processes for name in ("weights", "gradients", "optimizer", "masters")}
        return replace(self, **state).peak


def expected_memory(recipe: Recipe, batch: Batch, *, loaded: int = 0) -> Memory:
    """Peak memory of a process that trains `batch`; nothing is allocated to find out.

    Args:
        recipe: the run.
        batch: a large one.
        loaded: bytes of this process that are weights already.
    """
    whole = sketched(recipe, layers=None, device="meta")
    weights = bytes_of(whole.parameters())
    trained = [p for p in whole.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    half = any(p.dtype == torch.bfloat16 for p in trained)
    size = recipe.train.chunk_size
    part = batch if size is None else max(chunks(batch, size, count=chunk_count(batch, size)), key=tokens_of)
    return Memory(
        weights=weights,
        gradients=bytes_of(trained),
        optimizer=numbers * (12 if half else 8),
        activations=_activations(recipe, part),
        program=psutil.Process().memory_info().rss - loaded if local_device() == "cpu" else 0,
        masters=numbers * 4 if half else 0,
        chunked=size is not None and chunk_count(batch, size) > 1,
    )


def _activations(recipe: Recipe, batch: Batch) -> int:
    """Bytes that the forward pass keeps, and those of one layer of Gen that the backward pass computes again."""
    deep = sketched(recipe, layers=CUT, device="meta")

    def kept(model: CoSupModel) -> float:
        for part in (model.gen, model.emb):
            body_of(part).set_attn_implementation(_SHAPES_ONLY)
        with _counting(model) as count:
            model(moved_to(batch, "meta"))
        return float(count())

    total = whole_depth(recipe, deep, kept)
    if recipe.train.activation_checkpointing:
        plain = recipe.model_copy(update={"train": recipe.train.model_copy(update={"activation_checkpointing": False})})
        shallow = sketched(plain, layers=2, device="meta")
        total += kept(shallow) - kept(cut(shallow, "gen"))
    return int(total)


@contextmanager
def _counting(model: CoSupModel) -> Iterator[Callable[[], int]]:
    """Counts the bytes that autograd keeps meanwhile, weights left aside, each storage once."""
    kept: dict[int, Tensor] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)


class _Attention(torch.autograd.Function):
    """Keeps what the kernels of attention keep, and computes nothing: on the meta device, PyTorch's own keeps more."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("sketches without weights have no backward pass")


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    out: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.clone().transpose(1, 2), None


_SHAPES_ONLY = "cosup_shapes"
AttentionInterface.register(_SHAPES_ONLY, _attention)
