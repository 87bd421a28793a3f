"""The two losses as pure tensor functions.

Shapes: L labelled tokens, D hidden size, V vocabulary, K retrieval positions, N candidates.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 1024  # labelled tokens whose logits are in memory at once


def ntp(states_LD: Tensor, head_VD: Tensor, labels_L: Tensor, *, bias_V: Tensor | None = None) -> Tensor:
    """Next-token prediction, summed over the labelled tokens; the head is applied to them alone.

    Sum, not mean, so that a step split over ranks and micro-batches adds up to the same gradient. More than 1,024
    tokens are taken in chunks whose logits are computed again in the backward pass.

    Args:
        states_LD: Gen's last hidden states, each at the position before its labelled token.
        head_VD: weight of the LM head.
        labels_L: ids of the tokens to predict.
        bias_V: bias of the LM head, where it has one.

    Returns:
        Scalar float32 (float64 for float64 states): sum of -log p(label), 0 for no tokens.

    Source:
        L_NTP of Lee et al. 2024 (arXiv 2403.09024), section 3.
    """
    if len(states_LD) <= _CHUNK:
        return _ntp(states_LD, head_VD, labels_L, bias_V)
    chunks = zip(states_LD.split(_CHUNK), labels_L.split(_CHUNK), strict=True)
    sums = [checkpoint(_ntp, states, head_VD, labels, bias_V, use_reentrant=False) for states, labels in chunks]
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


def _ntp(states_LD: Tensor, head_VD: Tensor, labels_L: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_LV = F.linear(states_LD, head_VD, bias_V)
    return F.cross_entropy(accurate(logits_LV), labels_L, reduction="sum")


def accurate(x: Tensor) -> Tensor:
    """`x` in float32, or float64 as it is: losses and similarities are not computed in less."""
    return x if x.dtype == torch.float64 else x.float()


def nearest(queries_KD: Tensor, candidates_ND: Tensor, *, ignore_KN: Tensor) -> Tensor:
    """Column of each query's best candidate that counts, int64 [K]; arguments as for `nsp`."""
    scores_KN = accurate(queries_KD) @ accurate(candidates_ND).T
    return scores_KN.masked_fill(ignore_KN, -torch.inf).argmax(1)
