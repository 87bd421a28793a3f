"""Gen's layers, run with few operations: a step that writes a token spends as long between its products as in them.

Shapes: S tokens of a step, W of them whose states are wanted, D hidden size; H heads of queries, G heads of keys and
values, d head size, E = H d.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup.model.packing import Attend

Decoder = Callable[[Tensor, Tensor, Attend, Tensor], Tensor]
"""Last hidden states [W, D] of those tokens [S], at positions [S], that are at the places [W] of the step; what they
attend to is asked of `attend`."""

_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")  # normalised before, rotated halves, gated SiLU


def decoder_of(body: Any) -> Decoder:
    """A body's layers as they are called fastest: by hand where they are Llama's, else by transformers."""
    if body.config.model_type in _LIKE_LLAMA and body.config.hidden_act == "silu":
        return _LlamaDecoder(body)
    return _TransformersDecoder(body)


class _TransformersDecoder:
    def __init__(self, body: Any):
        self._body = body

    def __call__(self, ids_S: Tensor, positions_S: Tensor, attend: Attend, wanted_W: Tensor) -> Tensor:
        out = self._body(input_ids=ids_S[None], position_ids=positions_S[None], use_cache=False, attend=attend)
        states_WD: Tensor = out.last_hidden_state[0, wanted_W]
        return states_WD


class _LlamaDecoder:
    """The same products as transformers' modules, which are called, adapters included; the rest in fewer operations."""

    def __init__(self, body: Any):
        self._body = body

    def __call__(self, ids_S: Tensor, positions_S: Tensor, attend: Attend, wanted_W: Tensor) -> Tensor:
        x_SD = self._body.embed_tokens(ids_S)
        cos_1Sd, sin_1Sd = self._body.rotary_emb(x_SD, positions_S[None])
        half = sin_1Sd.shape[-1] // 2
        sin_1Sd[..., :half] *= -1  # the first half is turned the other way
        rotation = cos_1Sd[0, :, None], sin_1Sd[0, :, None]
        for number, layer in enumerate(self._body.layers):
            taken_SE = _attended(layer.self_attn, number, layer.input_layernorm(x_SD), rotation, attend)
            if number + 1 == len(self._body.layers):
                x_SD, taken_SE = x_SD[wanted_W], taken_SE[wanted_W]  # no layer reads the other tokens' states
            x_SD += layer.self_attn.o_proj(taken_SE)
            x_SD += _transformed(layer.mlp, layer.post_attention_layernorm(x_SD))
        states_WD: Tensor = self._body.norm(x_SD)
        return states_WD


def _attended(module: Any, number: int, x_SD: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
    """What the heads took [S, E], before the product that puts it together."""
    size = module.head_dim
    query_SHd, key_SGd, value_SGd = (
        project(x_SD).view(len(x_SD), -1, size) for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query_SHd, key_SGd = module.q_norm(query_SHd), module.k_norm(key_SGd)
    cos_S1d, sin_S1d = rotation
    both = torch.cat([query_SHd, key_SGd], 1)  # queries and keys are turned alike
    both = torch.addcmul(both * cos_S1d, both.roll(size // 2, -1), sin_S1d)
    query_SHd, key_SGd = both.split([query_SHd.shape[1], key_SGd.shape[1]], 1)
    query_1HSd, key_1GSd, value_1GSd = (x.transpose(0, 1)[None] for x in (query_SHd, key_SGd, value_SGd))
    taken_1HSd = attend(number, query_1HSd, key_1GSd, value_1GSd, module.scaling)
    return taken_1HSd[0].transpose(0, 1).reshape(len(x_SD), -1)


def _transformed(module: Any, x_SD: Tensor) -> Tensor:
    out_SD: Tensor = module.down_proj(F.silu(module.gate_proj(x_SD), inplace=True).mul_(module.up_proj(x_SD)))
    return out_SD
