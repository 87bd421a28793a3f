"""Packed sequences: laid end to end in one row without padding, each blind to the others.

Shapes: S packed tokens, L labelled tokens, D hidden size, K retrieval positions, N candidates, I ignored pairs,
B batch, H heads of queries, G heads of keys and values, T tokens, d head size, M = N + 1 bounds of N sequences.

A vector therefore can't depend on what else is in the batch, and nothing is computed for padding.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NotRequired, Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from cosup.template import IGNORED

ATTENTION = "cosup"


class Batch(TypedDict):
    """Packed sequences of one step, or of a part of it; see `cosup.train.Collator`.

    `gen_ids` [S] and `gen_lengths`: Gen's sequences. `label_positions` [L] and `labels` [L]: which states predict what;
    absent where `ntp` is not trained. `query_ids` and `query_lengths`: the same sequences up to their last queries,
    which a separate retriever reads; absent where there is none. Absent where `nsp` is not: `ret_positions` [K], the
    states that query, of the retriever's sequences or Gen's; `emb_ids` and `emb_lengths`, the N distinct passages;
    `candidates` [N], their keys, `NOBODY` where a sequence stands for none; `gold` [K], the keys to find; `ignored`
    [2, I], pairs of a query and a key neither label nor negative for it.
    """

    gen_ids: Tensor
    gen_lengths: list[int]
    label_positions: NotRequired[Tensor]
    labels: NotRequired[Tensor]
    query_ids: NotRequired[Tensor]
    query_lengths: NotRequired[list[int]]
    ret_positions: NotRequired[Tensor]
    emb_ids: NotRequired[Tensor]
    emb_lengths: NotRequired[list[int]]
    candidates: NotRequired[Tensor]
    gold: NotRequired[Tensor]
    ignored: NotRequired[Tensor]
    example_ids: NotRequired[list[str]]


class Labelled(Protocol):
    """A training sequence: ids and, as long, labels."""

    @property
    def ids(self) -> list[int]:
        """Of Gen's sequence."""

    @property
    def labels(self) -> list[int]:
        """`IGNORED` where nothing is learnt."""


def pack(rows: Sequence[Labelled], *, labels: bool = True) -> Batch:
    """Training sequences laid end to end.

    Args:
        rows: at least one.
        labels: whether `ntp` is wanted.
    """
    batch: Batch = {
        "gen_ids": torch.tensor([i for row in rows for i in row.ids]),
        "gen_lengths": [len(row.ids) for row in rows],
    }
    if labels:
        labels_S = torch.tensor([label for row in rows for label in row.labels])
        # a state predicts the token after it; the first token of a sequence is never labelled
        places_L = (labels_S != IGNORED).nonzero()[:, 0]
        batch["label_positions"], batch["labels"] = places_L - 1, labels_S[places_L]
    return batch


def tokens_of(batch: Batch) -> int:
    """How many tokens all models read of a batch."""
    return len(batch["gen_ids"]) + len(batch.get("query_ids", ())) + len(batch.get("emb_ids", ()))


def chunk_count(batch: Batch, size: int) -> int:
    """How many chunks `chunks` makes of a batch."""
    longest = max(len(batch["gen_lengths"]), len(batch.get("emb_lengths", ())))
    return -(-longest // size)


def chunks(batch: Batch, size: int, *, count: int) -> list[Batch]:
    """A batch in parts of at most `size` sequences of Gen and `size` passages each.

    Args:
        batch: not changed.
        size: of a part.
        count: how many parts, at least `chunk_count`; those that have nothing left hold one token that counts for
            nothing, so that processes with unequal work go through the same number of parts.
    """
    return [_chunk(batch, range(i * size, (i + 1) * size)) for i in range(count)]


def _chunk(batch: Batch, rows: range) -> Batch:
    start, stop = asked_from, asked_to = _span(batch["gen_lengths"], rows)
    ids_S, lengths = _sequences(batch["gen_ids"], batch["gen_lengths"], rows)
    part: Batch = {"gen_ids": ids_S, "gen_lengths": lengths}
    if "labels" in batch:
        here_L = _within(batch["label_positions"], start, stop)
        part["label_positions"], part["labels"] = batch["label_positions"][here_L] - start, batch["labels"][here_L]
    if "query_ids" in batch:
        asked_from, asked_to = _span(batch["query_lengths"], rows)
        part["query_ids"], part["query_lengths"] = _sequences(batch["query_ids"], batch["query_lengths"], rows)
    if "emb_ids" in batch:
        here_K = _within(batch["ret_positions"], asked_from, asked_to)
        part["ret_positions"] = batch["ret_positions"][here_K] - asked_from
        part["emb_ids"], part["emb_lengths"] = _sequences(batch["emb_ids"], batch["emb_lengths"], rows)
    return part


def _sequences(ids_S: Tensor, lengths: list[int], rows: range) -> tuple[Tensor, list[int]]:
    """Some of the packed sequences; one token where none of them is left."""
    start, stop = _span(lengths, rows)
    here = lengths[rows.start : rows.stop]
    return (ids_S[start:stop], here) if here else (ids_S[:1], [1])


def _span(lengths: Sequence[int], rows: range) -> tuple[int, int]:
    starts = list(accumulate(lengths, initial=0))
    return starts[min(rows.start, len(lengths))], starts[min(rows.stop, len(lengths))]


def _within(positions: Tensor, start: int, stop: int) -> Tensor:
    return (positions >= start) & (positions < stop)


def batches_by_tokens(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Rows sorted by length, longest first, in groups of at most `tokens` tokens, or of one row."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    group: list[int] = []
    size = 0
    for row in rows:
        if group and size + lengths[row] > tokens:
            yield group
            group, size = [], 0
        group.append(row)
        size += lengths[row]
    if group:
        yield group


def packed(body: nn.Module, ids_S: Tensor, lengths: list[int]) -> Tensor:
    """Last hidden states [S, D] of sequences laid end to end."""
    # a tensor on the CPU: what is compiled would be compiled anew for every other list of numbers
    lengths_N = torch.tensor(lengths)
    bounds_M = F.pad(lengths_N.cumsum(0), (1, 0)).int()
    positions_S = torch.arange(len(ids_S)) - bounds_M[:-1].repeat_interleave(lengths_N)
    out = body(
        input_ids=ids_S[None],
        position_ids=positions_S[None].to(ids_S.device),
        seq_lens=lengths_N,
        seq_bounds=bounds_M.to(ids_S.device),
        use_cache=False,
    )
    states_SD: Tensor = out.last_hidden_state[0]
    return states_SD


def last_states(states_SD: Tensor, lengths: list[int]) -> Tensor:
    """The state of each sequence's last token."""
    return states_SD[torch.tensor(lengths, device=states_SD.device).cumsum(0) - 1]


def mean_states(states_SD: Tensor, lengths: list[int]) -> Tensor:
    """The mean of each sequence's states."""
    return torch.stack([part.mean(0) for part in states_SD.split(lengths)])


class Attend(Protocol):
    """Attention of tokens to what was read before them, as the engine's cache computes it."""

    def __call__(
        self, layer: int, query_1HSd: Tensor, key_1GSd: Tensor, value_1GSd: Tensor, scale: float | None
    ) -> Tensor:
        """What each token takes, [1, H, S, d].

        Args:
            layer: number of the layer.
            query_1HSd: of the tokens that are read now.
            key_1GSd: theirs, which the cache keeps.
            value_1GSd: likewise.
            scale: of the scores; 1 / sqrt(d) for None.
        """


def attention(
    module: nn.Module,
    query_BHTd: Tensor,
    key_BHTd: Tensor,
    value_BHTd: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    seq_lens: Tensor | None = None,
    seq_bounds: Tensor | None = None,
    attend: Attend | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed sequences, and of the engine's rows, in transformers' interface.

    With `seq_lens`, and `seq_bounds` [N + 1], where they begin and end, the one row holds several sequences of these
    lengths, each blind to the others, and causal unless the module says that it is not. With `attend`, the engine's
    cache computes it. With neither, as where somebody calls an LM itself, `attention_mask` is a 4D mask, floats that
    are added or what is seen; without one, tokens see what is before them unless the module says otherwise.
    """
    if attend is None and seq_lens is None:
        if attention_mask is None and getattr(module, "is_causal", True):
            read, known = query_BHTd.shape[2], key_BHTd.shape[2]
            attention_mask = torch.ones(read, known, dtype=torch.bool, device=query_BHTd.device).tril(known - read)
        out_BHTd = F.scaled_dot_product_attention(
            query_BHTd, key_BHTd, value_BHTd, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        )
        return out_BHTd.transpose(1, 2), None
    if attend is not None:
        return _attended(module, query_BHTd, key_BHTd, value_BHTd, scaling, attend), None
    assert seq_lens is not None
    causal = getattr(module, "is_causal", True)
    if seq_bounds is not None and dropout == 0.0 and _has_kernel(query_BHTd):
        return _in_one_kernel(query_BHTd, key_BHTd, value_BHTd, scaling, causal, seq_lens, seq_bounds), None
    return _one_by_one(query_BHTd, key_BHTd, value_BHTd, scaling, causal, dropout, seq_lens), None


# what follows is not compiled: it would be anew for every other list of lengths


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attended(
    module: nn.Module, query_1HSd: Tensor, key_1GSd: Tensor, value_1GSd: Tensor, scale: float | None, attend: Attend
) -> Tensor:
    """What each token takes from the engine's cache, [1, S, H, d]."""
    return attend(module.layer_idx, query_1HSd, key_1GSd, value_1GSd, scale).transpose(1, 2)  # type: ignore[arg-type]


def _has_kernel(x: Tensor) -> bool:
    """Whether there is a kernel for sequences of unequal lengths."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _in_one_kernel(
    query_1HSd: Tensor,
    key_1GSd: Tensor,
    value_1GSd: Tensor,
    scale: float | None,
    causal: bool,
    seq_lens: Tensor,
    bounds_M: Tensor,
) -> Tensor:
    """What each token takes, [1, S, H, d], of all sequences at once, on a GPU."""
    times = query_1HSd.shape[1] // key_1GSd.shape[1]
    query_SHd = query_1HSd[0].transpose(0, 1)
    key_SHd, value_SHd = (x[0].transpose(0, 1).repeat_interleave(times, 1) for x in (key_1GSd, value_1GSd))
    longest = int(seq_lens.max())
    window = (-1, 0 if causal else -1)
    out: Any = varlen_attn(
        query_SHd, key_SHd, value_SHd, bounds_M, bounds_M, longest, longest, scale=scale, window_size=window
    )
    out_SHd: Tensor = out
    return out_SHd[None]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _one_by_one(
    query_1HSd: Tensor,
    key_1GSd: Tensor,
    value_1GSd: Tensor,
    scale: float | None,
    causal: bool,
    dropout: float,
    seq_lens: Tensor,
) -> Tensor:
    """What each token takes, [1, S, H, d]; on a CPU faster than any mask over the packed row."""
    # cut and joined by token, as they lie in memory: by head, each would be a copy of small pieces
    cut = (x.transpose(1, 2).split(seq_lens.tolist(), 1) for x in (query_1HSd, key_1GSd, value_1GSd))
    outs = []
    for part in zip(*cut, strict=True):
        q, k, v = (x.transpose(1, 2) for x in part)
        outs.append(
            F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, dropout_p=dropout, enable_gqa=True)
        )
    return torch.cat([out.transpose(1, 2) for out in outs], 1)


def _mask(*, attention_mask: Tensor | None = None, **how: Any) -> Tensor | None:
    """transformers' 4D mask where padding is to be hidden; packed sequences and the engine's rows have none."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **how)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, _mask)
