from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cosup.cli import app
from cosup.config import Recipe, UserError, dump_recipe, load_recipe, parse_recipe
from cosup.data import Evidence, Example, Passage, write_records
from cosup.model import CoSupModel, compute_dtype, tokens_of
from cosup.model.lms import body_of
from cosup.train import estimate_run, start_model, train_recipe
from cosup.train.estimate import expected_memory, timing
from cosup.train.estimate.memory import _counting
from cosup.train.estimate.sample import _assumed, sample_of
from cosup.train.estimate.sketches import bytes_of
from cosup.train.optimizer import adamw

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def deep_lm(tiny_lm: Path, tmp_path: Path) -> Path:
    """The tiny LM with seven layers."""
    folder = tmp_path / "deep"
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_lm, num_hidden_layers=7)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(deep_lm: Path, tmp_path: Path, passages: list[Passage]) -> Any:
    examples = [Example(f"e{i}", "squad", f"which {i}?", (Evidence(f"p{i % 12}", "Oslo"),)) for i in range(20)]
    write_records(tmp_path / "passages.jsonl", passages)
    write_records(tmp_path / "examples.jsonl", examples)

    def make(model: dict[str, Any] | None = None, **train: Any) -> Recipe:
        return parse_recipe(
            {
                "name": "tiny",
                "model": {"gen": str(deep_lm)} | (model or {}),
                "data": {"folder": str(tmp_path), "train": ["examples.jsonl"], "passages": ["passages.jsonl"]},
                "train": {"batch_size": 8, "dtype": "float32", "epochs": 3} | train,
            }
        )

    return make


def really_kept(recipe: Recipe) -> int:
    """Bytes that the forward pass of the whole model keeps on the CPU."""
    batch = sample_of(recipe, 1).largest
    model = start_model(recipe).to(compute_dtype(recipe.train.dtype, "cpu")).train()
    with _counting(model) as count:
        model(batch)
    return count()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "bfloat16"},
        {"objective": "nsp"},
        {"objective": "ntp"},
        {"objective": "separate"},
        {"model": {"emb": "gen"}},
        {"model": {"emb_layers": 3}},
        {"model": {"lora": {"rank": 2}}},
    ],
    ids=str,
)
def test_what_is_counted_without_weights_is_what_the_forward_pass_keeps(recipe: Any, settings: dict[str, Any]) -> None:
    made = recipe(**settings)
    expected = expected_memory(made, sample_of(made, 1).largest).activations
    assert expected == pytest.approx(really_kept(made), rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"model": {"lora": {"rank": 2}}}], ids=str)
def test_weights_gradients_and_optimiser_state_are_those_of_the_real_ones(recipe: Any, settings: Any) -> None:
    made = recipe(**settings)
    model = start_model(made).to(compute_dtype(made.train.dtype, "cpu"))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer = adamw(trained, made.train)
    optimizer.step()
    state = optimizer.state_dict()
    moments = [t for values in state["state"].values() for t in values.values() if t.ndim]
    memory = expected_memory(made, sample_of(made, 1).largest)
    assert memory.weights == bytes_of(model.parameters())
    assert memory.gradients == bytes_of(p.grad for p in trained)
    assert memory.optimizer == bytes_of([*moments, *state.get("masters", [])])


def test_chunks_and_recomputed_layers_keep_less(recipe: Any) -> None:
    plain, chunked, redone = (
        estimate_run(made).memory for made in (recipe(), recipe(chunk_size=2), recipe(activation_checkpointing=True))
    )
    assert chunked.activations < plain.activations / 2
    assert redone.activations < plain.activations
    assert (chunked.gradients, chunked.optimizer) == (plain.gradients, plain.optimizer)


@pytest.mark.parametrize("model", [{}, {"emb": "gen"}, {"emb_layers": 5}], ids=str)
def test_seconds_are_extrapolated_to_all_layers(recipe: Any, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    made = recipe(model)
    sketched: list[CoSupModel] = []
    original = timing.sketched

    def watched(*args: Any, **options: Any) -> CoSupModel:
        sketch = original(*args, **options)
        if options["device"] == "cpu":
            sketched.append(sketch)
        return sketch

    def one_second_a_layer(work: Any) -> float:
        gen, emb = (body_of(part).config.num_hidden_layers for part in (sketched[-1].gen, sketched[-1].emb))
        return 2.0 + gen + (0.0 if "emb" in model else 0.5 * emb)

    monkeypatch.setattr(timing, "sketched", watched)
    monkeypatch.setattr(timing, "_seconds_of", one_second_a_layer)
    monkeypatch.setattr(timing, "_updates", lambda *_: 3.0)
    sample = sample_of(made, 1)
    batch = min(sample.batches, key=lambda b: abs(tokens_of(b) - sample.tokens))
    passes = 2.0 + 7 + (0.0 if "emb" in model else 0.5 * model.get("emb_layers", 7))
    assert timing.seconds_of_step(made, sample) == pytest.approx(sample.tokens / tokens_of(batch) * passes + 3.0)


def test_steps_are_those_of_the_run(recipe: Any, tmp_path: Path) -> None:
    made = recipe(log_steps=1)
    found = estimate_run(made)
    run = train_recipe(made, tmp_path / "run")
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    assert f'"step": {found.steps}' in last
    assert found.steps == 9
    assert found.step_seconds is not None
    assert found.step_seconds > 0
    assert found.minutes == pytest.approx(9 * found.step_seconds / 60)
    assert estimate_run(recipe(max_steps=4)).steps == 4


def test_data_that_is_not_there_is_assumed_to_be_of_full_length_and_said_so(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "passages.jsonl").unlink()
    found = estimate_run(recipe())
    assert found.sample.tokens == 8 * (1024 + 256)
    assert found.steps is None
    table = found.table()
    assert "full lengths, because" in table["a step"]
    assert "passages.jsonl" in table["a step"]
    assert table["time in all"] == "unknown"


def test_processes_share_a_step_and_what_is_sharded(recipe: Any) -> None:
    alone, four = estimate_run(recipe()), estimate_run(recipe(), processes=4)
    assert four.sample.tokens < alone.sample.tokens / 2
    assert four.memory.sharded(4) < four.memory.peak
    assert "with FSDP" in four.table()
    assert "with FSDP" not in alone.table()
    with pytest.raises(UserError, match="batch_size is 8, which 3 processes"):
        estimate_run(recipe(), processes=3)


def test_what_does_not_fit_this_machine_is_not_timed(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        available = 1000

    monkeypatch.setattr(timing.psutil, "virtual_memory", Full)
    found = estimate_run(recipe())
    assert found.step_seconds is None
    assert "not measured: a few layers alone need" in found.table()["time a step"]
    assert found.memory.peak > 0


def test_bfloat16_that_this_cpu_imitates_is_not_timed(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = estimate_run(recipe(dtype="bfloat16"))
    assert found.step_seconds is None
    assert "can only imitate" in found.table()["time a step"]


@pytest.mark.parametrize("path", sorted((RECIPES / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_recipes_are_counted_without_weights(path: Path) -> None:
    recipe = load_recipe(path)
    memory = expected_memory(recipe, _assumed(recipe, 8))
    assert memory.weights > 2 * 6.7e9
    assert memory.sharded(8) < memory.peak / 3


@pytest.mark.parametrize(("name", "processes"), [("llama3.2-1b", 1), ("qwen3-0.6b", 1), ("llama2-7b", 8)])
def test_the_recipes_of_larger_models_fit_cards_of_80_gb(name: str, processes: int) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    memory = expected_memory(recipe, _assumed(recipe, recipe.train.batch_size // processes))
    assert 20e9 < memory.sharded(processes) < 70e9


def test_a_dry_run_prints_a_table_and_writes_nothing(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe()))
    before = sorted(tmp_path.rglob("*"))
    command = ["train", str(tmp_path / "recipe.yaml"), "--dry-run", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("peak memory", "time a step", "optimiser", "activations"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_starts_with_what_is_trained_and_frozen_with_tokens_steps_and_memory(recipe: Any, tmp_path: Path) -> None:
    shown: dict[str, str] = {}
    made = recipe({"lora": {"rank": 2, "on": ["gen"]}}, max_steps=2)
    train_recipe(made, tmp_path / "run", on_start=shown.update)
    model = start_model(made)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    frozen_emb = sum(p.numel() for p in model.emb.parameters()) / 1e6
    assert shown["trained"] == f"gen {trained:.1f}M"
    assert shown["frozen"].endswith(f"emb {frozen_emb:.1f}M")
    assert shown["steps"] == "2"
    assert shown["memory"].startswith("about ")
    tokens = sum(map(tokens_of, sample_of(made, 1).batches[:2])) / 2
    assert shown["tokens"].startswith(f"about {tokens:,.0f} a step")
