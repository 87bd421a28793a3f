"""Every shipped recipe and launch file is checked without weights, and without a download."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from cosup.config import ModelSection, UserError, load_recipe
from cosup.model import CoSupModel, sketch
from cosup.train.parts import choose_trained

FOLDER = Path(__file__).parent.parent / "recipes"
PAPER = sorted((FOLDER / "paper").glob("*.yaml"))
LARGER = {"llama3.2-1b": 2048, "qwen3-0.6b": 1024, "llama2-7b": 4096}
LAUNCH = sorted((FOLDER / "accelerate").glob("*.yaml"))
# as their publishers state them
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1_100_048_384,
    "openai-community/gpt2-large": 774_030_080,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen3-0.6B": 596_049_920,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_shape_has_the_published_number_of_parameters_and_three_rows_more(name: str) -> None:
    gen = sketch(ModelSection(gen=name)).gen
    tied = gen.get_output_embeddings().weight is gen.get_input_embeddings().weight
    rows = 3 * gen.config.hidden_size * (1 if tied else 2)
    assert sum(p.numel() for p in gen.parameters()) == PUBLISHED[name] + rows


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_recipes_are_valid_without_weights(path: Path) -> None:
    recipe = load_recipe(path)
    model = sketch(recipe.model, retriever=recipe.train.objective == "separate")
    choose_trained(model, recipe)
    assert model.device.type == "meta"
    trains_emb = any(p.requires_grad for p in model.emb.parameters())
    assert trains_emb is (recipe.train.objective != "ntp")
    assert (model.projection is None) is (recipe.model.emb is None)
    assert model.dim == 4096
    assert model.settings.pooling == "last"


@pytest.mark.parametrize("name", LARGER)
def test_the_recipes_of_larger_models_are_valid_without_weights(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    model = sketch(recipe.model)
    choose_trained(model, recipe)
    assert (model.device.type, model.dim) == ("meta", LARGER[name])
    assert all(p.requires_grad for p in model.parameters())


def test_a_sketch_has_the_parameters_of_the_model_that_the_recipe_starts_from(tiny_lm: Path) -> None:
    for more in ({}, {"lora": {"rank": 2}}, {"emb": "gen"}, {"emb_layers": 1}):
        section = ModelSection.model_validate({"gen": str(tiny_lm), **more})
        shapes = {name: p.shape for name, p in sketch(section).named_parameters()}
        assert shapes == {name: p.shape for name, p in CoSupModel.start(section).named_parameters()}


@pytest.mark.parametrize("more", [{}, {"emb": "gen"}, {"emb_layers": 1}])
def test_a_sketch_of_adapters_that_go_on_stands_on_what_they_lie_on(more: Any, tiny_lm: Path, tmp_path: Path) -> None:
    lora = {"rank": 2, "alpha": 4}
    start = ModelSection.model_validate({"gen": str(tiny_lm), "lora": lora, **more})
    CoSupModel.start(start).save(tmp_path / "first")
    section = ModelSection.model_validate({"gen": str(tmp_path / "first"), "lora": lora})
    shapes = [(n, p.shape, p.requires_grad) for n, p in sketch(section).named_parameters()]
    assert shapes == [(n, p.shape, p.requires_grad) for n, p in sketch(start).named_parameters()]


def test_a_cut_sketch_with_weights_computes(tiny_lm: Path) -> None:
    model = sketch(ModelSection(gen=str(tiny_lm)), layers=1, device="cpu")
    assert len(model.gen.model.layers) == len(model.emb.layers) == 1
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    assert torch.isfinite(model.embed(ids, mask)).all()


def test_a_model_of_unknown_shape_is_refused_with_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"configuration of 'nobody/nothing'.*meta-llama/Llama-2-7b-hf"):
        sketch(ModelSection(gen="nobody/nothing"))


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_launch_files_are_what_accelerate_reads_and_share_the_papers_batch(path: Path) -> None:
    config = load_config_from_file(str(path))
    machines, _, per_machine = path.stem.split("-")[0].rpartition("x")
    assert config.num_machines == int(machines or 1)
    assert config.num_processes == config.num_machines * int(per_machine)
    assert load_recipe(PAPER[0]).train.batch_size % config.num_processes == 0
    assert bool(config.fsdp_config) is ("fsdp" in path.stem)
    assert config.mixed_precision == "no"


def test_there_are_launch_files_for_one_gpu_eight_and_four_machines() -> None:
    assert {path.stem for path in LAUNCH} == {"1-gpu", "8-gpus-ddp", "8-gpus-fsdp", "4x8-gpus-ddp", "4x8-gpus-fsdp"}
