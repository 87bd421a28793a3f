"""The mean of several runs' adapters."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from cosup.config import UserError
from cosup.model.folders import read_settings

PATH = Path(__file__).parents[1] / "experiments" / "average.py"
DOWN, UP, ROWS = "layer.lora_A.weight", "layer.lora_B.weight", "rows"


@pytest.fixture
def average(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = spec_from_file_location("average", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model(folder: Path, seed: int, *, rank: int = 2, emb: str = "emb", emb_is_gen: bool = False) -> Path:
    """A folder with what is read of it."""
    (folder / "gen").mkdir(parents=True)
    (folder / "emb").mkdir()
    (folder / "emb" / "adapter_model.safetensors").write_text(emb)
    (folder / "cosup.json").write_text(json.dumps({"format_version": 1, "emb_is_gen": emb_is_gen}))
    rng = torch.Generator().manual_seed(seed)
    shapes = {DOWN: (rank, 5), UP: (4, rank), ROWS: (3, 5)}
    weights = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    save_file(weights, folder / "gen" / "adapter_model.safetensors")
    return folder


def run(average: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: Path | str) -> None:
    monkeypatch.setattr(sys, "argv", ["average.py", *map(str, arguments)])
    average.main()


def test_the_mean_has_the_rank_of_each_and_is_the_nearest_one_of_it(
    average: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [model(tmp_path / str(seed), seed, emb=f"emb {seed}") for seed in range(3)]
    run(average, monkeypatch, *models, "--out", tmp_path / "out")
    each = [load_file(folder / "gen" / "adapter_model.safetensors") for folder in models]
    found = load_file(tmp_path / "out" / "gen" / "adapter_model.safetensors")
    assert {name: weight.shape for name, weight in found.items()} == {n: w.shape for n, w in each[0].items()}
    torch.testing.assert_close(found[ROWS], sum(weights[ROWS] for weights in each) / 3)
    exact = torch.stack([weights[UP] @ weights[DOWN] for weights in each]).mean(0)
    left_out = torch.linalg.svdvals(exact)[2:]
    assert torch.linalg.norm(found[UP] @ found[DOWN] - exact) == pytest.approx(float(torch.linalg.norm(left_out)))
    assert (tmp_path / "out" / "emb" / "adapter_model.safetensors").read_text() == "emb 0"


def test_emb_becomes_the_mean_of_theirs_where_that_is_asked_and_is_known_by_another_fingerprint(
    average: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [model(tmp_path / str(seed), seed) for seed in range(2)]
    for seed, folder in enumerate(models):  # what Emb_seq is taught, is not what Gen is
        (folder / "emb").rename(folder / "text")
        (model(tmp_path / f"other {seed}", 10 + seed) / "gen").rename(folder / "emb")
        save_file({"weight": torch.full((3, 2), 4.0 * seed)}, folder / "projection.safetensors")
    run(average, monkeypatch, *models, "--out", tmp_path / "gen alone")
    run(average, monkeypatch, *models, "--out", tmp_path / "both", "--emb")
    first, mean = (load_file(tmp_path / n / "emb" / "adapter_model.safetensors") for n in ("gen alone", "both"))
    each = [load_file(folder / "emb" / "adapter_model.safetensors") for folder in models]
    torch.testing.assert_close(first, each[0])
    torch.testing.assert_close(mean[ROWS], (each[0][ROWS] + each[1][ROWS]) / 2)
    projections = [load_file(tmp_path / n / "projection.safetensors")["weight"] for n in ("gen alone", "both")]
    assert [float(weight[0, 0]) for weight in projections] == [0.0, 2.0]
    known = {read_settings(tmp_path / name).fingerprint for name in ("gen alone", "both")}
    assert len(known) == 2
    gens = [load_file(tmp_path / name / "gen" / "adapter_model.safetensors") for name in ("gen alone", "both")]
    torch.testing.assert_close(*gens)


def test_the_mean_of_one_model_is_that_model(
    average: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = model(tmp_path / "only", 7)
    run(average, monkeypatch, only, only, "--out", tmp_path / "out")
    one, same = (load_file(f / "gen" / "adapter_model.safetensors") for f in (only, tmp_path / "out"))
    torch.testing.assert_close(same[UP] @ same[DOWN], one[UP] @ one[DOWN])
    torch.testing.assert_close(same[ROWS], one[ROWS])


def test_what_has_no_mean_is_refused_in_a_sentence(
    average: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, other_rank = model(tmp_path / "some", 0), model(tmp_path / "other", 1, rank=3)
    whole, shared = model(tmp_path / "whole", 2), model(tmp_path / "shared", 3, emb_is_gen=True)
    (whole / "gen" / "adapter_model.safetensors").rename(whole / "gen" / "model.safetensors")
    damaged = model(tmp_path / "damaged", 4)
    (damaged / "gen" / "adapter_model.safetensors").write_bytes(b"no weights")
    for models, reason in (
        ((some, other_rank), "not of the same layers and rank"),
        ((some, whole), "there is no .*whole/gen"),
        ((shared, shared), "Emb_seq is Gen"),
        ((some, tmp_path / "nowhere"), "nowhere"),
        ((some, damaged), "adapter_model.safetensors is damaged"),
    ):
        with pytest.raises(UserError, match=reason):
            run(average, monkeypatch, *models, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="would be replaced"):
        run(average, monkeypatch, some, "--out", some)
