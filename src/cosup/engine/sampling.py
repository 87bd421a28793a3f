"""Choosing the next token of several rows.

Shapes: R rows, V vocabulary, M rows that sample.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cosup.engine.options import Options


def choose(logits_RV: Tensor, options: Sequence[Options], draws: Sequence[float]) -> list[int]:
    """The next token of each row, greedily or by its options.

    A row's token depends on its own logits, options and draw alone.

    Args:
        logits_RV: -inf where a token is not allowed.
        options: of each row.
        draws: R numbers from [0, 1), used where a row samples.
    """
    tokens: list[int] = logits_RV.argmax(-1).tolist()
    rows = [row for row, each in enumerate(options) if each.temperature > 0]
    if rows:
        sampled = _sample(logits_RV[rows], [options[row] for row in rows], [draws[row] for row in rows])
        for row, token in zip(rows, sampled, strict=True):
            tokens[row] = token
    return tokens


def _sample(logits_MV: Tensor, options: Sequence[Options], draws: Sequence[float]) -> list[int]:
    """Draws from what temperature, then top-k, then top-p leave, by inverting the cumulative distribution."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_MV.device)[:, None]

    vocabulary = logits_MV.shape[1]
    below_MV = logits_MV.double() - logits_MV.amax(-1, keepdim=True)  # else a tiny temperature leaves infinities
    scaled_MV = below_MV / column([each.temperature for each in options])
    sorted_MV, order_MV = scaled_MV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(vocabulary, device=logits_MV.device)
    probabilities_MV = sorted_MV.masked_fill(
        ranks_V >= column([each.top_k or vocabulary for each in options]), -torch.inf
    )
    probabilities_MV = probabilities_MV.softmax(-1)
    before_MV = probabilities_MV.cumsum(-1) - probabilities_MV
    # the likeliest token always stays: nothing comes before it
    probabilities_MV = probabilities_MV.masked_fill(before_MV >= column([each.top_p for each in options]), 0.0)
    reached_MV = probabilities_MV.cumsum(-1)
    picks_M1 = torch.searchsorted(reached_MV, column(draws) * reached_MV[:, -1:], right=True)
    last_M1 = (probabilities_MV > 0).sum(-1, keepdim=True) - 1  # rounding may reach past it
    tokens: list[int] = order_MV.gather(1, torch.minimum(picks_M1, last_M1))[:, 0].tolist()
    return tokens
