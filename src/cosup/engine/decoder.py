"""Gen's layers, run with few operations: a step that writes a token spends as long between its products as in them.

Shapes: S tokens of a step, W of them whose states are wanted, D hidden size; H heads of queries, G heads of keys and
values, d head size, E = H d.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup.engine.products import products
from cosup.model.packing import Attend

Decoder = Callable[[Tensor, Tensor, Attend, Tensor], Tensor]
"""Last hidden states [W, D] of those tokens [S], at positions [S], that are at the places [W] of the step; what they
attend to is asked of `attend`."""

_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")  # normalised before, rotated halves, gated SiLU


def decoder_of(body: Any, *, pack: bool) -> Decoder:
    """A body's layers as they are called fastest: by hand where they are Llama's, else by transformers.

    Args:
        body: a decoder of transformers.
        pack: whether its linear layers are packed where they are called by hand; see `cosup.engine.products`.
    """
    if body.config.model_type in _LIKE_LLAMA and body.config.hidden_act == "silu":
        return _LlamaDecoder(body, pack=pack)
    return _TransformersDecoder(body)


class _TransformersDecoder:
    def __init__(self, body: Any):
        self._body = body

    def __call__(self, ids_S: Tensor, positions_S: Tensor, attend: Attend, wanted_W: Tensor) -> Tensor:
        out = self._body(input_ids=ids_S[None], position_ids=positions_S[None], use_cache=False, attend=attend)
        states_WD: Tensor = out.last_hidden_state[0, wanted_W]
        return states_WD


class _LlamaDecoder:
    """The same sums as transformers' modules, adapters included, in fewer operations."""

    def __init__(self, body: Any, *, pack: bool):
        self._body = body
        self._layers = [_LlamaLayer(layer, number, pack=pack) for number, layer in enumerate(body.layers)]

    def __call__(self, ids_S: Tensor, positions_S: Tensor, attend: Attend, wanted_W: Tensor) -> Tensor:
        x_SD = self._body.embed_tokens(ids_S)
        cos_1Sd, sin_1Sd = self._body.rotary_emb(x_SD, positions_S[None])
        half = sin_1Sd.shape[-1] // 2
        sin_1Sd[..., :half] *= -1  # the first half is turned the other way
        rotation = cos_1Sd[0, :, None], sin_1Sd[0, :, None]
        for layer in self._layers[:-1]:
            taken_SE = layer.attended(x_SD, rotation, attend)
            x_SD = layer.transformed(x_SD, taken_SE)
        last = self._layers[-1]
        taken_SE = last.attended(x_SD, rotation, attend)
        x_WD = last.transformed(x_SD[wanted_W], taken_SE[wanted_W])  # no layer reads the other tokens' states
        states_WD: Tensor = self._body.norm(x_WD)
        return states_WD


class _LlamaLayer:
    def __init__(self, layer: Any, number: int, *, pack: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self._layer, self._attention, self._number = layer, attention, number
        self._inputs = products(attention.q_proj, attention.k_proj, attention.v_proj, pack=pack)
        self._output = products(attention.o_proj, pack=pack)
        self._gates = products(mlp.gate_proj, mlp.up_proj, pack=pack)
        self._down = products(mlp.down_proj, pack=pack)

    def attended(self, x_SD: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """What the heads took [S, E], before the product that puts it together."""
        size = self._attention.head_dim
        inputs = self._inputs(self._layer.input_layernorm(x_SD))
        query_SHd, key_SGd, value_SGd = (x.view(len(x_SD), -1, size) for x in inputs)
        if hasattr(self._attention, "q_norm"):
            query_SHd, key_SGd = self._attention.q_norm(query_SHd), self._attention.k_norm(key_SGd)
        cos_S1d, sin_S1d = rotation
        both = torch.cat([query_SHd, key_SGd], 1)  # queries and keys are turned alike
        both = torch.addcmul(both * cos_S1d, both.roll(size // 2, -1), sin_S1d)
        query_SHd, key_SGd = both.split([query_SHd.shape[1], key_SGd.shape[1]], 1)
        query_1HSd, key_1GSd, value_1GSd = (x.transpose(0, 1)[None] for x in (query_SHd, key_SGd, value_SGd))
        taken_1HSd = attend(self._number, query_1HSd, key_1GSd, value_1GSd, self._attention.scaling)
        return taken_1HSd[0].transpose(0, 1).reshape(len(x_SD), -1)

    def transformed(self, x_SD: Tensor, taken_SE: Tensor) -> Tensor:
        """The layer's states, from those that it read, which are overwritten, and what its heads took."""
        (put_together_SD,) = self._output(taken_SE)
        x_SD += put_together_SD
        gate_SI, up_SI = self._gates(self._layer.post_attention_layernorm(x_SD))
        (out_SD,) = self._down(F.silu(gate_SI, inplace=True).mul_(up_SI))
        x_SD += out_SD
        return x_SD
