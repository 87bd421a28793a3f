import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_step import two_processes, wrap
from test_train import forget_projection

from cosup.cli import app
from cosup.config import Recipe, UserError, parse_recipe
from cosup.data import Evidence, Example, Passage, write_records
from cosup.model import AnswerSettings, CoSupModel
from cosup.train import export_model, start_model, train_recipe
from cosup.train.checkpoints import load_trained, save_trained


@pytest.fixture
def recipe(tiny_lm: Path, tmp_path: Path, passages: list[Passage]) -> Any:
    examples = [Example(f"e{i}", "squad", f"which {i}?", (Evidence(f"p{i}", "Oslo"),)) for i in range(8)]
    write_records(tmp_path / "passages.jsonl", passages)
    write_records(tmp_path / "examples.jsonl", examples)

    def make(
        dtype: str = "float32", lora: dict[str, Any] | None = None, emb: Path | None = None, freeze: tuple = ()
    ) -> Recipe:
        train = {"batch_size": 4, "max_steps": 4, "epochs": 9, "save_steps": 2, "dtype": dtype, "log_steps": 2}
        return parse_recipe(
            {
                "name": "tiny",
                "model": {"gen": str(tiny_lm), "lora": lora, "emb": emb and str(emb)},
                "data": {"folder": str(tmp_path), "train": ["examples.jsonl"], "passages": ["passages.jsonl"]},
                "train": train | {"freeze": freeze},
            }
        )

    return make


def weights(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


def test_adapters_are_exported_in_half_precision_with_one_tokenizer(
    recipe: Any, tmp_path: Path, passages: list[Passage]
) -> None:
    run = train_recipe(recipe(lora={"rank": 2}), tmp_path / "run")
    export_model(run, tmp_path / "half", dtype="bfloat16")
    types = {w.dtype for file in (tmp_path / "half").rglob("*.safetensors") for w in load_file(file).values()}
    assert types == {torch.bfloat16}
    assert not (tmp_path / "half" / "emb" / "tokenizer.json").exists()
    whole, half = (CoSupModel.load(folder, dtype="float32") for folder in (run, tmp_path / "half"))
    assert half.fingerprint != whole.fingerprint
    assert half.template.emb_tokenizer is half.template.tokenizer
    cosines = (whole.embed_passages(passages) * half.embed_passages(passages)).sum(1)
    assert (cosines > 0.999).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_checkpoint_becomes_the_same_folder_as_the_finished_model(
    recipe: Any, tmp_path: Path, dtype: str
) -> None:
    run = train_recipe(recipe(dtype), tmp_path / "run")
    export_model(run / "checkpoints" / "checkpoint-4", tmp_path / "last")
    export_model(run / "checkpoints" / "checkpoint-2", tmp_path / "middle")
    assert weights(tmp_path / "last") == weights(run / "model")
    assert weights(tmp_path / "middle").keys() == weights(run / "model").keys()
    assert weights(tmp_path / "middle") != weights(run / "model")
    assert CoSupModel.load(tmp_path / "last").fingerprint == CoSupModel.load(run).fingerprint
    assert "- ntp: " in (tmp_path / "last" / "README.md").read_text()


@pytest.mark.parametrize("freeze", [(), ("projection",)])
def test_a_projection_is_exported_as_it_was_fitted_whether_it_is_trained_or_not(
    recipe: Any, tiny_stranger: Path, tmp_path: Path, freeze: tuple[str, ...]
) -> None:
    settings = recipe(emb=tiny_stranger, freeze=freeze)
    run = train_recipe(settings, tmp_path / "run")
    checkpoint = run / "checkpoints" / "checkpoint-4"
    export_model(checkpoint, tmp_path / "out")
    assert "projection.safetensors" in weights(tmp_path / "out")
    assert weights(tmp_path / "out") == weights(run / "model")
    two_processes(spread, tmp_path, settings, checkpoint)
    (checkpoint / "model.safetensors").unlink()
    export_model(checkpoint, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(run / "model")


def test_a_checkpoint_of_before_without_its_frozen_projection_is_refused(
    recipe: Any, tiny_stranger: Path, tmp_path: Path
) -> None:
    run = train_recipe(recipe(emb=tiny_stranger, freeze=("projection",)), tmp_path / "run")
    forget_projection(run / "checkpoints" / "checkpoint-4")
    with pytest.raises(UserError, match="lacks its frozen projection, which an earlier version did not save"):
        export_model(run / "checkpoints" / "checkpoint-4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def spread(rank: int, folder: Path, settings: Recipe, checkpoint: Path) -> None:
    """Writes the weights of a checkpoint anew, as a run under FSDP2 writes them."""
    model = start_model(settings)
    load_trained(model, checkpoint)
    save_trained(wrap(model, "fsdp", "ntp+nsp"), checkpoint)


def test_a_checkpoint_that_is_spread_over_processes_becomes_the_same_folder(recipe: Any, tmp_path: Path) -> None:
    settings = recipe()
    run = train_recipe(settings, tmp_path / "run")
    checkpoint = run / "checkpoints" / "checkpoint-4"
    two_processes(spread, tmp_path, settings, checkpoint)
    (checkpoint / "model.safetensors").unlink()
    export_model(checkpoint, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(run / "model")


def test_adapters_stay_adapters_unless_they_are_merged_and_give_the_same_vectors(
    recipe: Any, tmp_path: Path, passages: list[Passage]
) -> None:
    run = train_recipe(recipe(lora={"rank": 2}), tmp_path / "run")
    sources = {"checkpoint": run / "checkpoints" / "checkpoint-4", "run": run, "model": run / "model"}
    vectors = CoSupModel.load(run, dtype="float32").embed_passages(passages)
    for name, source in sources.items():
        for merge in (False, True):
            out = tmp_path / f"{name}-{merge}"
            export_model(source, out, merge=merge)
            assert (out / "gen" / "adapter_config.json").is_file() is not merge
            assert (out / "gen" / "model.safetensors").is_file() is merge
            assert CoSupModel.load(out, dtype="float32").embed_passages(passages) == pytest.approx(vectors, abs=3e-5)


def test_adapters_without_a_model_card_are_merged_into_a_folder_with_an_empty_one(
    tiny_adapters: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_adapters, tmp_path / "adapters")
    (tmp_path / "adapters" / "README.md").unlink()
    export_model(tmp_path / "adapters", tmp_path / "out", merge=True)
    assert (tmp_path / "out" / "gen" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "README.md").read_text() == ""


def test_what_is_no_checkpoint_is_refused(recipe: Any, tmp_path: Path) -> None:
    run = train_recipe(recipe(), tmp_path / "run")
    with pytest.raises(UserError, match="there is no model at"):
        export_model(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(UserError, match="is the model itself"):
        export_model(run, run / "model")
    alone = tmp_path / "alone" / "checkpoint-4"
    shutil.copytree(run / "checkpoints" / "checkpoint-4", alone)
    with pytest.raises(UserError, match=r"is not inside its run: .*recipe\.yaml is missing"):
        export_model(alone, tmp_path / "out")
    (run / "checkpoints" / "checkpoint-4" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        export_model(run / "checkpoints" / "checkpoint-4", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["export", str(tiny_folder), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert weights(tmp_path / "out") == weights(tiny_folder)
    assert json.loads((tmp_path / "out" / "cosup.json").read_text())["fingerprint"]


def test_the_command_says_how_a_model_answers_best(tiny_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    def export(source: Path, out: str, *options: str) -> AnswerSettings:
        result = CliRunner().invoke(app, ["export", str(source), "--out", str(tmp_path / out), *options])
        assert result.exit_code == 0, result.output
        return CoSupModel.load(tmp_path / out).settings.answers

    first = export(tiny_folder, "first", "--statements", "--hybrid", "0.2")
    assert first == AnswerSettings(statements=True, hybrid=0.2)
    assert export(tmp_path / "first", "second", "--no-statements") == AnswerSettings(hybrid=0.2)
    assert CoSupModel.load(tmp_path / "first").fingerprint == CoSupModel.load(tiny_folder).fingerprint
    with pytest.raises(UserError, match="hybrid is nan"):
        export_model(tiny_folder, tmp_path / "third", answers={"hybrid": float("nan")})
    assert not (tmp_path / "third").exists()
