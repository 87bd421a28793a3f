import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import AutoModel, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cosup.engine.decoder import _LlamaDecoder, _TransformersDecoder, decoder_of
from cosup.engine.products import packs
from cosup.model.packing import ATTENTION

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def causal(layer: int, query_1HSd: Tensor, key_1GSd: Tensor, value_1GSd: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(
        query_1HSd, key_1GSd, value_1GSd, is_causal=True, scale=scale, enable_gqa=True
    )


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, **HEADS, attention_bias=True, mlp_bias=True),
        LlamaConfig(**SIZES, **HEADS, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        MistralConfig(**SIZES, **HEADS),
        Qwen2Config(**SIZES, **HEADS),
        Qwen3Config(**SIZES, **HEADS),
        LlamaConfig(**SIZES, **HEADS, hidden_act="gelu"),
        GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_layers_called_by_hand_give_the_states_that_transformers_gives(config, lora):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    body = AutoModel.from_config(config, attn_implementation=ATTENTION).double().eval()
    if lora:
        if config.model_type == "gpt2":
            pytest.skip("its layers are transformers' own in any case")
        inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"), body)
    by_hand = decoder_of(body, pack=False)
    assert isinstance(by_hand, _LlamaDecoder) is (getattr(config, "hidden_act", "") == "silu")
    for parameter in body.parameters():  # norms of all ones would hide a forgotten one
        parameter.add_(torch.randn_like(parameter) * 0.05)
    ids, positions = torch.randint(50, (7,)), torch.arange(3, 10)
    for wanted in ([0, 1, 2, 3, 4, 5, 6], [6], [5, 2]):
        places = torch.tensor(wanted)
        expected = _TransformersDecoder(body)(ids, positions, causal, places)
        torch.testing.assert_close(by_hand(ids, positions, causal, places), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_packed_layers_give_the_same_states_up_to_rounding() -> None:
    torch.manual_seed(0)
    body = AutoModel.from_config(Qwen2Config(**SIZES, **HEADS), attn_implementation=ATTENTION).eval()
    ids, positions, places = torch.randint(50, (7,)), torch.arange(7), torch.tensor([2, 6])
    expected = _TransformersDecoder(body)(ids, positions, causal, places)
    packed = decoder_of(body, pack=packs(body))(ids, positions, causal, places)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)
