"""Layers that are compiled, or of fewer kernels, give the gradients of plain ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import cites, collate, gradients, says, step
from torch._dynamo.utils import counters

from cosup.config import LoraSection, ModelSection, UserError
from cosup.model import CoSupModel
from cosup.train.layers import compile_layers, fuse_layers, quicken

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's compiler raises warnings at work, and filters them itself

ONE = [cites("a", "p0", negatives=("p5",)), says("b"), cites("c", "p1", "p2")]
OTHER = [cites("d", "p3"), cites("e", "p0", "p4", "p1")]


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What other tests compiled is not taken for what this one does."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 1])
def test_losses_and_gradients_are_those_of_plain_layers_for_any_lengths_and_batches(
    tiny_folder: Path, chunk: int | None, forgotten: None
) -> None:
    plain, compiled = (CoSupModel.load(tiny_folder, dtype="float64", device="cpu").train() for _ in range(2))
    names = list(compiled.state_dict())
    assert compile_layers(compiled, True)
    for examples in (ONE, OTHER):
        batch = collate(plain, examples, "ntp+nsp")
        loss, same = (step(model, batch, "ntp+nsp", chunk=chunk) for model in (plain, compiled))
        # Llama's norms compute in float32 whatever they are given
        torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
        expected = gradients(plain)
        assert any(bool(grad.any()) for grad in expected.values())
        torch.testing.assert_close(gradients(compiled), expected, rtol=1e-4, atol=1e-6)
    assert list(compiled.state_dict()) == names


@pytest.mark.slow
def test_other_lengths_are_not_compiled_anew(tiny_folder: Path, forgotten: None) -> None:
    model = CoSupModel.load(tiny_folder, dtype="float64", device="cpu").train()
    compile_layers(model, True)
    counters.clear()
    step(model, collate(model, ONE, "ntp+nsp"), "ntp+nsp", chunk=None)
    assert counters["stats"]["unique_graphs"] > 0  # or there was nothing that could be compiled anew
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(model, collate(model, OTHER, "ntp+nsp"), "ntp+nsp", chunk=None)
        step(model, collate(model, [*OTHER, *ONE], "ntp+nsp"), "ntp+nsp", chunk=None)


def test_auto_leaves_small_models_and_those_that_share_a_step_as_they_are(
    tiny: CoSupModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda work: work)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **_: None)
    assert not compile_layers(tiny, "auto")
    assert not compile_layers(tiny, False)
    assert compile_layers(tiny, "auto", size=135_000_000)
    monkeypatch.setattr("cosup.train.layers.several_processes", lambda: True)
    assert not compile_layers(tiny, "auto", size=135_000_000)


def test_auto_goes_by_the_device_that_will_train_not_by_where_the_model_is(
    tiny: CoSupModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda work: work)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **_: None)
    assert quicken(tiny, "auto", device="cpu", size=135_000_000)
    assert not quicken(tiny, "auto", device="cuda", size=135_000_000)


def test_fused_norms_and_adapters_give_the_gradients_of_plain_ones(tiny_folder: Path) -> None:
    section = ModelSection(gen=str(tiny_folder / "gen"), lora=LoraSection(rank=4, alpha=6))
    plain, fused = (CoSupModel.start(section).double().train() for _ in range(2))
    with torch.no_grad():
        for model in (plain, fused):
            for name, weight in model.named_parameters():
                if "lora_B" in name:  # a new adapter adds nothing
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    names = list(fused.state_dict())
    layers = fused.gen.config.num_hidden_layers
    assert fuse_layers(fused) == 2 * (2 * layers + 1 + 7 * layers)  # norms, and seven linear layers in each
    batch = collate(plain, ONE, "ntp+nsp")
    loss, same = (step(model, batch, "ntp+nsp", chunk=None) for model in (plain, fused))
    # Llama's norms compute in float32 whatever they are given
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(fused), gradients(plain), rtol=1e-4, atol=1e-5)
    assert list(fused.state_dict()) == names


def test_adapters_that_drop_out_are_left_as_they_are(tiny_folder: Path) -> None:
    section = ModelSection(gen=str(tiny_folder / "gen"), lora=LoraSection(dropout=0.1))
    model = CoSupModel.start(section)
    assert fuse_layers(model) == 2 * (2 * model.gen.config.num_hidden_layers + 1)


def test_without_a_compiler_auto_goes_on_and_true_is_refused_in_a_sentence(
    tiny: CoSupModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiler_missing(work: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\nand a long trace")

    monkeypatch.setattr(torch, "compile", compiler_missing)
    assert not compile_layers(tiny, "auto", size=135_000_000)
    with pytest.raises(UserError, match=r"train.compile is true, but .* \(no C\+\+ compiler was found\)"):
        compile_layers(tiny, True)
