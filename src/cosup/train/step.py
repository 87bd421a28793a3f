"""One optimisation step's loss and gradient: over all processes, whole or in chunks.

Shapes: K retrieval positions, N candidates, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cosup import losses
from cosup.config import Objective
from cosup.model import Batch, Output, chunk_count, chunks

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Weights:
    """What the sums of a step are multiplied by, so that its gradient is that of L over all processes.

    Args:
        ntp: of the summed `ntp` of this process.
        nsp: of its summed `nsp`.

    DDP and FSDP average gradients over processes, hence the number of processes in both.
    """

    ntp: float
    nsp: float

    @classmethod
    def of(cls, batch: Batch, *, objective: Objective, lambda_: float) -> "Weights":
        """From the labelled tokens and retrieval positions of all processes; one all_reduce."""
        own = torch.tensor(
            [len(batch.get("labels", ())), len(batch.get("gold", ()))],
            dtype=torch.double,
            device=batch["gen_ids"].device,
        )
        if losses.several_processes():
            dist.all_reduce(own)
        tokens, retrievals = own.clamp(min=1).tolist()
        world = dist.get_world_size() if losses.several_processes() else 1
        return cls(world / tokens, world * (lambda_ if objective == "ntp+nsp" else 1.0) / retrievals)


def objective_loss(
    output: Output, batch: Batch, *, objective: Objective, lambda_: float, temperature: float
) -> tuple[Tensor, Metrics]:
    """L = L_NTP + lambda * L_NSP over one step, and what there is to log of it.

    Args:
        output: of the model.
        batch: that it was given.
        objective: `nsp` and `separate` give L_NSP the weight 1.
        lambda_: weight of L_NSP in `ntp+nsp`.
        temperature: tau.

    Source:
        Lee et al. 2024 (arXiv 2403.09024), section 3.
    """
    weights = Weights.of(batch, objective=objective, lambda_=lambda_)
    loss = weights.ntp * output.ntp_sum
    metrics = {"ntp_sum": float(output.ntp_sum.detach()), "ntp_count": float(output.ntp_count)}
    if "emb_ids" in batch:
        nsp_sum, more = _nsp(output.queries_KD, output.candidates_ND, batch, temperature=temperature)
        loss, metrics = loss + weights.nsp * nsp_sum, metrics | more
    return loss, metrics


def backward_in_chunks(
    model: Any,
    batch: Batch,
    *,
    size: int,
    objective: Objective,
    lambda_: float,
    temperature: float,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
) -> tuple[Tensor, Metrics]:
    """The gradient of `objective_loss`, with the activations of one chunk at a time in memory.

    A first pass without activations gives queries and candidates, from which follow L_NSP and its gradient with respect
    to them; a second pass computes each chunk again, with the same random numbers, and back-propagates `ntp` and that
    gradient together. All processes go through the same number of chunks, and exchange gradients on the last.

    Args:
        model: a CoSupModel, or one wrapped by DDP or sharded by FSDP2.
        batch: the whole step of this process: its passages, with those of the others, are the candidates.
        size: sequences of Gen, and passages, in a chunk.
        objective: see `objective_loss`.
        lambda_: see `objective_loss`.
        temperature: see `objective_loss`.
        backward: what is called with each chunk's loss.

    Returns:
        The loss, detached, and what there is to log.

    Source:
        Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (arXiv 2101.06983).
    """
    parts = chunks(batch, size, count=_most(chunk_count(batch, size), batch["gen_ids"].device))
    weights = Weights.of(batch, objective=objective, lambda_=lambda_)
    cached = _Cache(model, batch, parts, weight=weights.nsp, temperature=temperature) if "emb_ids" in batch else None
    ntp_sums: list[Tensor] = []
    for number, part in enumerate(parts):
        with _synchronised(model, last=number == len(parts) - 1):
            if cached is not None:
                cached.replay_random(number)
            output = model(part)
            loss = weights.ntp * output.ntp_sum
            backward(loss if cached is None else loss + cached.surrogate(number, output))
            ntp_sums.append(output.ntp_sum.detach())
    ntp_sum = torch.stack(ntp_sums).sum()
    metrics = {"ntp_sum": float(ntp_sum), "ntp_count": float(len(batch.get("labels", ())))}
    loss = weights.ntp * ntp_sum
    return (loss, metrics) if cached is None else (loss + cached.loss, metrics | cached.metrics)


class _Cache:
    """The gradient of the weighted nsp with respect to each chunk's queries and candidates.

    Attributes:
        loss: the weighted nsp.
        metrics: of it.
    """

    def __init__(self, model: Any, batch: Batch, parts: Sequence[Batch], *, weight: float, temperature: float):
        self._random: list[tuple[Tensor, Tensor | None]] = []
        outputs: list[Output] = []
        with torch.no_grad():
            for part in parts:
                self._random.append(_random_state(part["gen_ids"].device))
                outputs.append(
                    model(cast(Batch, {k: v for k, v in part.items() if k not in ("labels", "label_positions")}))
                )
        left = len(batch["emb_lengths"])
        real = []  # how many of each chunk's vectors stand for a passage of the batch
        for output in outputs:
            real.append(min(left, len(output.candidates_ND)))
            left -= real[-1]
        queries = [output.queries_KD.detach() for output in outputs]
        vectors = [output.candidates_ND[:n].detach() for output, n in zip(outputs, real, strict=True)]
        queries_KD, candidates_ND = torch.cat(queries).requires_grad_(), torch.cat(vectors).requires_grad_()
        nsp_sum, self.metrics = _nsp(queries_KD, candidates_ND, batch, temperature=temperature)
        self.loss = (weight * nsp_sum).detach()
        (weight * nsp_sum).backward()
        assert queries_KD.grad is not None
        assert candidates_ND.grad is not None
        self._queries = queries_KD.grad.split([len(q) for q in queries])
        self._candidates = candidates_ND.grad.split(real)

    def replay_random(self, number: int) -> None:
        """Puts the random numbers back to where the first pass over a chunk had them."""
        cpu, cuda = self._random[number]
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    def surrogate(self, number: int, output: Output) -> Tensor:
        """A scalar whose gradient is that of the weighted nsp through this chunk."""
        queries, candidates = self._queries[number], self._candidates[number]
        on_queries = (output.queries_KD * queries).sum()
        on_candidates = (output.candidates_ND[: len(candidates)] * candidates).sum()
        # a chunk that is there for the others' sake still reaches every weight, with gradient 0
        total: Tensor = on_queries + on_candidates + 0.0 * output.candidates_ND.sum()
        return total


def _nsp(queries_KD: Tensor, own_ND: Tensor, batch: Batch, *, temperature: float) -> tuple[Tensor, Metrics]:
    """This process's summed L_NSP against the candidates of all."""
    keys_N, candidates_ND = losses.distinct(losses.gathered(batch["candidates"]), losses.gathered(own_ND))
    gold_K, ignore_KN = losses.targets(keys_N, batch["gold"], batch["ignored"])
    nsp_sum = losses.nsp(queries_KD, candidates_ND, gold_K=gold_K, ignore_KN=ignore_KN, temperature=temperature)
    metrics = {"nsp_sum": float(nsp_sum.detach()), "nsp_count": float(len(gold_K)), "candidates": float(len(keys_N))}
    if len(gold_K):
        best_K = losses.nearest(queries_KD.detach(), candidates_ND.detach(), ignore_KN=ignore_KN)
        metrics["nsp_right"] = float((best_K == gold_K).sum())
    return nsp_sum, metrics


def _most(count: int, device: torch.device) -> int:
    if not losses.several_processes():
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None


@contextmanager
def _synchronised(model: Any, *, last: bool) -> Iterator[None]:
    """Gradients stay in their process until the last chunk."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)
        yield
    elif hasattr(model, "no_sync") and not last:  # DDP
        with model.no_sync():
            yield
    else:
        yield
