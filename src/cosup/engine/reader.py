"""Reading: chunks of several rows pass through Gen in one go, each at its own place in a shared key-value cache.

Shapes: S tokens of a step, laid end to end in one row; W wanted states; R rows of the cache; L cached tokens; C tokens
of a chunk; D hidden size; V vocabulary; H heads of queries, G heads of keys and values, N = H / G; M = N C; d head
size.

Nothing is padded. The linear layers see all tokens of a step at once, so that a row that writes a token costs little
beside one that reads a passage.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup.engine.decoder import Decoder, decoder_of
from cosup.engine.products import Products, packs, products
from cosup.model import CoSupModel, body_of


class Chunk(NamedTuple):
    """Tokens to be read by a row.

    Args:
        slot: which row of the cache.
        start: how many tokens it holds.
        ids: what it reads, at least one.
        wanted: of how many of its last tokens the states are returned.
    """

    slot: int
    start: int
    ids: list[int]
    wanted: int = 1


class Gen(NamedTuple):
    """Gen as readers run it; made once for many of them, since its weights may be laid out anew for it.

    Args:
        decoder: its layers.
        head: gives the next-token logits [R, V] of states [R, D].
        dtype: that it computes in.
        layers: how many.
        device: where.
    """

    decoder: Decoder
    head: Products
    dtype: torch.dtype
    layers: int
    device: torch.device

    @classmethod
    def of(cls, model: CoSupModel) -> Self:
        """A model's Gen, in evaluation mode, with the weights that it has now."""
        body = body_of(model.gen)
        pack = packs(body)
        head = products(model.gen.get_output_embeddings(), pack=pack)
        return cls(decoder_of(body, pack=pack), head, body.dtype, model.gen.config.num_hidden_layers, model.device)


class Reader:
    """Gen with a cache of several rows.

    Args:
        gen: reads.
        rows: how many.
    """

    def __init__(self, gen: Gen, rows: int):
        self._gen, self._cache = gen, _Cache(rows, gen.layers)

    def read(self, chunks: Sequence[Chunk]) -> Tensor:
        """Last hidden states [W, D] of the wanted tokens, chunk by chunk; what a row held behind them is overwritten.

        Args:
            chunks: of different rows.
        """
        # rows that read one token attend together, so they stand together
        order = sorted(range(len(chunks)), key=lambda i: (len(chunks[i].ids) > 1, chunks[i].slot))
        step = self._cache.step = _Step([chunks[i] for i in order], self._gen.device, self._gen.dtype)
        ends = dict(zip(order, itertools.accumulate(step.lengths), strict=True))
        places = [place for i, chunk in enumerate(chunks) for place in range(ends[i] - chunk.wanted, ends[i])]
        return self._gen.decoder(step.ids_S, step.columns_S, self._cache, torch.tensor(places, device=self._gen.device))

    def logits(self, states_RD: Tensor) -> Tensor:
        """Next-token logits [R, V]."""
        (logits_RV,) = self._gen.head(states_RD)
        return logits_RV

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first cached tokens of one row to another."""
        self._cache.copy(source, target, length)


class _Step:
    """Which tokens a step reads, where they go in the cache, and what each of them attends to; shared by all layers."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device, dtype: torch.dtype):
        lengths = [len(chunk.ids) for chunk in chunks]
        self.chunks, self.lengths = chunks, lengths
        self.end = max(chunk.start + len(chunk.ids) for chunk in chunks)
        self.rows = max(chunk.slot for chunk in chunks) + 1
        self.ids_S = torch.tensor([i for chunk in chunks for i in chunk.ids], device=device)
        self.columns_S = torch.cat([torch.arange(c.start, c.start + len(c.ids)) for c in chunks]).to(device)
        self.slots_S = torch.tensor([chunk.slot for chunk in chunks for _ in chunk.ids], device=device)
        self.single = sum(length == 1 for length in lengths)
        self._singles_end = max((chunk.start + 1 for chunk in chunks[: self.single]), default=0)
        self._mask_R11L = self._singles_mask(device, dtype) if self.single else None
        self._masks_CL = [_causal(chunk, device, dtype) for chunk in chunks[self.single :]]
        self._masks_ML: list[Tensor] = []

    def attend(self, query_1HSd: Tensor, keys_RGLd: Tensor, values_RGLd: Tensor, scale: float | None) -> Tensor:
        """What each token takes from its own row; [1, H, S, d]."""
        parts = []
        if self.single:
            parts.append(self._attend_singles(query_1HSd[0, :, : self.single], keys_RGLd, values_RGLd, scale))
        start = self.single
        masks_ML = self._masks(query_1HSd.shape[1] // keys_RGLd.shape[1])
        for chunk, mask_ML in zip(self.chunks[self.single :], masks_ML, strict=True):
            end = start + len(chunk.ids)
            keys_1GLd, values_1GLd = (x[chunk.slot, None, :, : mask_ML.shape[1]] for x in (keys_RGLd, values_RGLd))
            parts.append(self._attend_chunk(query_1HSd[:, :, start:end], keys_1GLd, values_1GLd, mask_ML, scale))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _attend_chunk(
        self, query_1HCd: Tensor, keys_1GLd: Tensor, values_1GLd: Tensor, mask_ML: Tensor, scale: float | None
    ) -> Tensor:
        """A chunk of several tokens of one row; heads that share keys are laid out as tokens here, too."""
        heads, length, size = query_1HCd.shape[1:]
        groups = keys_1GLd.shape[1]
        out_1GMd = F.scaled_dot_product_attention(
            query_1HCd.reshape(1, groups, -1, size), keys_1GLd, values_1GLd, attn_mask=mask_ML, scale=scale
        )
        return out_1GMd.reshape(1, heads, length, size)

    def _masks(self, times: int) -> list[Tensor]:
        """Of the chunks, each so many times below itself; the same for all layers."""
        self._masks_ML = self._masks_ML or [mask_CL.repeat(times, 1) for mask_CL in self._masks_CL]
        return self._masks_ML

    def _attend_singles(self, query_HRd: Tensor, keys_RGLd: Tensor, values_RGLd: Tensor, scale: float | None) -> Tensor:
        """Rows of one token each, together; the heads that share keys are laid out as tokens, so that no key is copied.

        A row in between that reads something else or nothing comes along, and what it attends to is thrown away.
        """
        slots = [chunk.slot for chunk in self.chunks[: self.single]]
        first, last = slots[0], slots[-1] + 1
        heads, rows, size = query_HRd.shape
        query_RHd = query_HRd.transpose(0, 1)
        if last - first != rows:
            spread_RHd = query_RHd.new_zeros(last - first, heads, size)
            spread_RHd[[slot - first for slot in slots]] = query_RHd
            query_RHd = spread_RHd
        groups = keys_RGLd.shape[1]
        out_RGNd = F.scaled_dot_product_attention(
            query_RHd.reshape(-1, groups, heads // groups, size),
            keys_RGLd[first:last, :, : self._singles_end],
            values_RGLd[first:last, :, : self._singles_end],
            attn_mask=self._mask_R11L,
            scale=scale,
        )
        out_RHd = out_RGNd.reshape(-1, heads, size)
        if last - first != rows:
            out_RHd = out_RHd[[slot - first for slot in slots]]
        return out_RHd.transpose(0, 1)[None]

    def _singles_mask(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        slots = [chunk.slot for chunk in self.chunks[: self.single]]
        starts = [0] * (slots[-1] + 1 - slots[0])
        for chunk in self.chunks[: self.single]:
            starts[chunk.slot - slots[0]] = chunk.start
        hidden_RL = torch.arange(self._singles_end, device=device) > torch.tensor(starts, device=device)[:, None]
        mask_RL = torch.zeros(hidden_RL.shape, dtype=dtype, device=device)
        return mask_RL.masked_fill_(hidden_RL, -torch.inf)[:, None, None]


def _causal(chunk: Chunk, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What the tokens of a chunk see of their row, [C, L]: everything up to themselves."""
    length = len(chunk.ids)
    mask_CL = torch.full((length, chunk.start + length), -torch.inf, dtype=dtype, device=device)
    return mask_CL.triu_(chunk.start + 1)


class _Cache:
    """Keys and values of all layers, each [R, G, L, d]: every row filled from the left, without padding or holes.

    Attributes:
        held: of each layer; None before it has read anything.
        step: what is being read.
    """

    def __init__(self, rows: int, layers: int):
        self._rows = rows
        self.held: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.step: _Step

    def __call__(
        self, layer: int, query_1HSd: Tensor, key_1GSd: Tensor, value_1GSd: Tensor, scale: float | None
    ) -> Tensor:
        """Puts the step's tokens in their places and lets them attend; see `cosup.model.packing.Attend`."""
        step, held = self.step, self.held[layer]
        if held is None:
            held = self.held[layer] = _empty(key_1GSd), _empty(value_1GSd)
        keys_RGLd, values_RGLd = self._grow(layer, held, step.rows, step.end)
        keys_RGLd[step.slots_S, :, step.columns_S] = key_1GSd[0].transpose(0, 1)
        values_RGLd[step.slots_S, :, step.columns_S] = value_1GSd[0].transpose(0, 1)
        return step.attend(query_1HSd, keys_RGLd, values_RGLd, scale)

    def _grow(self, layer: int, held: tuple[Tensor, Tensor], rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Makes room for so many rows and tokens: twice as much as there was, so that growing stays rare."""
        has_rows, _, has_length, _ = held[0].shape
        if rows > has_rows or length > has_length:
            rows = min(max(rows, 2 * has_rows), self._rows) if rows > has_rows else has_rows
            length = max(length, 2 * has_length, 64) if length > has_length else has_length
            held = self.held[layer] = _grown(held[0], rows, length), _grown(held[1], rows, length)
        return held

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first tokens of one row to another."""
        for layer, held in enumerate(self.held):
            assert held is not None
            for states_RGLd in self._grow(layer, held, max(source, target) + 1, length):
                states_RGLd[target, :, :length] = states_RGLd[source, :, :length]


def _empty(states_1GSd: Tensor) -> Tensor:
    return states_1GSd.new_zeros(0, states_1GSd.shape[1], 0, states_1GSd.shape[3])


def _grown(held_RGLd: Tensor, rows: int, length: int) -> Tensor:
    has_rows, groups, has_length, size = held_RGLd.shape
    grown_RGLd = held_RGLd.new_zeros(rows, groups, length, size)
    grown_RGLd[:has_rows, :, :has_length] = held_RGLd
    return grown_RGLd
