import pytest
import torch
from torch import nn

from cosup.engine import products as module
from cosup.engine.products import packs, products

needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch packs no weights")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def linears(dtype: torch.dtype, *, bias: tuple[bool, ...]) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(48, 16 * (i + 1), bias=own).to(dtype) for i, own in enumerate(bias)]


@needs_mkldnn
@torch.no_grad()
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("bias", [(False,), (True,), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_packed_layers_give_what_the_layers_give(dtype: torch.dtype, bias: tuple[bool, ...], rows: int) -> None:
    layers = linears(dtype, bias=bias)
    x = torch.randn(rows, 48).to(dtype)
    for out, layer in zip(products(*layers, pack=True)(x), layers, strict=True):
        torch.testing.assert_close(out, layer(x), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@torch.no_grad()
def test_what_is_no_plain_linear_layer_is_called_as_it_is() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    layer, x = Adapted(4, 4), torch.randn(2, 4)
    (out,) = products(layer, pack=True)(x)
    assert out.equal(layer(x))


@needs_mkldnn
def test_only_models_on_a_cpu_that_are_not_too_large_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 4)
    assert packs(layer)
    assert packs(layer.bfloat16())
    assert not packs(layer.double())
    assert not packs(layer.float().to("meta"))
    monkeypatch.setattr(module, "MOST_PACKED", 79)
    assert not packs(nn.Linear(4, 4))
    monkeypatch.setattr(module, "MOST_PACKED", 80)
    assert packs(nn.Linear(4, 4))
