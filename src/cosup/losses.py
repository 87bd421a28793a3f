"""The two losses as pure tensor functions, and the candidates of all processes.

Shapes: L labelled tokens, D hidden size, V vocabulary, K retrieval positions, N candidates, M vectors of all processes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]

NOBODY = -1
"""Key of a vector that stands for no passage: it is never a candidate."""

_CHUNK = 1024  # labelled tokens whose logits are in memory at once


def ntp(states_LD: Tensor, head: Head, labels_L: Tensor) -> Tensor:
    """Next-token prediction, summed over the labelled tokens; the head is applied to them alone.

    Sum, not mean, so that a step split over ranks and micro-batches adds up to the same gradient. More than 1,024
    tokens are taken in chunks whose logits are computed again in the backward pass.

    Args:
        states_LD: Gen's last hidden states, each at the position before its labelled token.
        head: the LM head, from states [.., D] to logits [.., V].
        labels_L: ids of the tokens to predict.

    Returns:
        Scalar float32 (float64 for float64 states): sum of -log p(label), 0 for no tokens.

    Source:
        L_NTP of Lee et al. 2024 (arXiv 2403.09024), section 3.
    """
    if len(states_LD) <= _CHUNK:
        return _ntp(states_LD, head, labels_L)
    chunks = zip(states_LD.split(_CHUNK), labels_L.split(_CHUNK), strict=True)
    sums = [checkpoint(_ntp, states, head, labels, use_reentrant=False) for states, labels in chunks]
    return torch.stack(sums).sum()


def nsp(queries_KD: Tensor, candidates_ND: Tensor, *, gold_K: Tensor, ignore_KN: Tensor, temperature: float) -> Tensor:
    """Next-sequence prediction, summed over the retrieval positions.

    -log of the softmax over the candidates of <h, e(c)> / tau, at the gold one. Candidates are distinct: a passage that
    several positions share stands once. For cosine similarity both sides come normalised.

    Args:
        queries_KD: Gen's states at `[Ret]`.
        candidates_ND: vectors of the distinct passages.
        gold_K: column of each position's gold passage, int64.
        ignore_KN: True where a candidate is neither label nor negative for a position.
        temperature: tau, above 0.

    Returns:
        Scalar float32 (float64 for float64 inputs): 0 for no positions.

    Source:
        L_NSP of Lee et al. 2024 (arXiv 2403.09024), section 3; InfoNCE.
    """
    if not len(queries_KD):
        return accurate(queries_KD).sum() + 0.0 * accurate(candidates_ND).sum()
    scores_KN = accurate(queries_KD) @ accurate(candidates_ND).T / temperature
    return F.cross_entropy(scores_KN.masked_fill(ignore_KN, -torch.inf), gold_K, reduction="sum")


def _ntp(states_LD: Tensor, head: Head, labels_L: Tensor) -> Tensor:
    return F.cross_entropy(accurate(head(states_LD)), labels_L, reduction="sum")


def accurate(x: Tensor) -> Tensor:
    """`x` in float32, or float64 as it is: losses and similarities are not computed in less."""
    return x if x.dtype == torch.float64 else x.float()


def nearest(queries_KD: Tensor, candidates_ND: Tensor, *, ignore_KN: Tensor) -> Tensor:
    """Column of each query's best candidate that counts, int64 [K]; arguments as for `nsp`."""
    scores_KN = accurate(queries_KD) @ accurate(candidates_ND).T
    return scores_KN.masked_fill(ignore_KN, -torch.inf).argmax(1)


def gathered(x_ND: Tensor) -> Tensor:
    """Rows of all processes, in rank order, with gradient: [M, D]; `x_ND` itself where there is one process.

    Each rank may bring another number of rows, or none. The backward pass adds up what every rank's loss says of a row,
    so each of them has to take part in it, even with weight 0.

    Args:
        x_ND: this rank's rows, of any type; without gradient where it needs none.
    """
    if not several_processes():
        return x_ND
    counts = _counts(x_ND)
    rows_MD: Tensor = _Gather.apply(x_ND, counts)  # type: ignore[no-untyped-call]
    return rows_MD


def distinct(keys_M: Tensor, vectors_MD: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates: for each key the first vector in rank order stands for all.

    Args:
        keys_M: int64; rows with the key `NOBODY` are left out.
        vectors_MD: a vector each.

    Returns:
        Keys int64 [N], ascending, and vectors [N, D].
    """
    keys_N, column_M = keys_M.unique(return_inverse=True)
    rows_M = torch.arange(len(keys_M), device=keys_M.device)
    first_N = torch.full_like(keys_N, len(keys_M)).scatter_reduce(0, column_M, rows_M, "amin")
    known_N = keys_N != NOBODY
    return keys_N[known_N], vectors_MD[first_N[known_N]]


def targets(keys_N: Tensor, gold_K: Tensor, ignored_2I: Tensor) -> tuple[Tensor, Tensor]:
    """Where each query's gold stands among the candidates, and which of them it ignores.

    Args:
        keys_N: of the candidates, ascending.
        gold_K: key of each query's gold; every one is among the candidates.
        ignored_2I: pairs of a query's number and a key, which need not be among them.

    Returns:
        Columns int64 [K] and a mask [K, N], for `nsp`.
    """
    ignore_KN = torch.zeros(len(gold_K), len(keys_N), dtype=torch.bool, device=keys_N.device)
    if not len(keys_N):
        return gold_K, ignore_KN
    query_I, key_I = ignored_2I[0], ignored_2I[1].contiguous()
    column_I = torch.searchsorted(keys_N, key_I).clamp(max=len(keys_N) - 1)
    here_I = keys_N[column_I] == key_I
    ignore_KN[query_I[here_I], column_I[here_I]] = True
    return torch.searchsorted(keys_N, gold_K), ignore_KN


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _counts(x_ND: Tensor) -> list[int]:
    own = torch.tensor([len(x_ND)], device=x_ND.device)
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return [int(count) for count in counts]


class _Gather(torch.autograd.Function):
    """all_gather of uneven rows; backward: all_reduce, then the own slice."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = x_ND.new_zeros((max(counts), *x_ND.shape[1:]))
        padded[: len(x_ND)] = x_ND
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        summed_MD = grads[0].clone()
        dist.all_reduce(summed_MD)
        start = sum(ctx.counts[: dist.get_rank()])
        return summed_MD[start : start + ctx.counts[dist.get_rank()]], None
