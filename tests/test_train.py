import itertools
import json
import logging
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from cosup.config import Recipe, TrainSection, UserError, parse_recipe
from cosup.data import Evidence, Example, Passage, Question, write_records
from cosup.files import sha256
from cosup.model import CoSupModel
from cosup.train import (
    MasterAdamW,
    NeighbourSampler,
    checkpoints_in,
    collate,
    load_data,
    objective_loss,
    rate_at,
    remove_run,
    start_model,
    train_recipe,
    trainer,
)
from cosup.train.collate import passage_key


@pytest.fixture
def corpus(tmp_path: Path, passages: list[Passage], questions: list[Question], examples: list[Example]) -> Path:
    write_records(tmp_path / "passages.jsonl", passages)
    write_records(tmp_path / "questions.jsonl", questions)
    write_records(tmp_path / "examples.jsonl", examples)
    return tmp_path


@pytest.fixture
def recipe(corpus: Path, tiny_lm: Path) -> dict:
    return {
        "name": "tiny",
        "model": {"gen": str(tiny_lm)},
        "data": {"folder": str(corpus), "train": ["questions.jsonl", "examples.jsonl"], "passages": ["passages.jsonl"]},
        "train": {
            "batch_size": 4,
            "max_steps": 4,
            "epochs": 99,
            "log_steps": 1,
            "dtype": "float32",
            "learning_rate": 1e-2,
        },
    }


class StoppedError(Exception):
    pass


class Interrupt(TrainerCallback):
    """Stops a run at the end of a step, before anything of it is saved."""

    def __init__(self, step: int):
        self._step = step

    def on_step_end(self, args: object, state: Any, control: object, **_: object) -> None:
        if state.global_step == self._step:
            raise StoppedError


def with_train(raw: dict, **changes: object) -> Recipe:
    return parse_recipe({**raw, "train": raw["train"] | changes})


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_candidates_are_distinct_and_what_is_neither_label_nor_negative_is_ignored(
    tiny: CoSupModel, passages: list[Passage]
) -> None:
    examples = [
        Example("a", "squad", "x", (Evidence("p0", "c", also=("p1",), negatives=("p2", "p3")), Evidence("p4", "d"))),
        Example("b", "squad", "y", (Evidence("p1", "c"),)),
        Example("c", "squad", "z", (Evidence("p0", "c", negatives=("p4",)),)),
    ]
    batch = collate(tiny.template, examples, {p.id: p for p in passages}, TrainSection(negatives=1))
    columns = ["p0", "p4", "p1", "p2"]  # golds by first occurrence, then hard negatives; p3 is beyond the one asked for
    names = {passage_key(p.id): p.id for p in passages}
    assert [names[key] for key in batch["candidates"].tolist()] == columns
    assert len(batch["emb_lengths"]) == len(columns)
    assert [names[key] for key in batch["gold"].tolist()] == ["p0", "p4", "p1", "p0"]
    # the first may not count its `also` and the other gold of its response; nor the second the first's gold
    assert [(k, names[key]) for k, key in batch["ignored"].T.tolist()] == [(0, "p1"), (0, "p4"), (1, "p0")]
    ids = batch["gen_ids"][batch["ret_positions"]]
    assert set(ids.tolist()) == {tiny.template.ret}


def test_accepted_passages_change_neither_loss_nor_gradient(tiny: CoSupModel, passages: list[Passage]) -> None:
    by_id = {p.id: p for p in passages}
    section = TrainSection(objective="nsp", negatives=9)

    def gradient(also: tuple[str, ...], negatives: tuple[str, ...]) -> tuple[float, torch.Tensor]:
        tiny.zero_grad()
        example = Example("a", "squad", "x", (Evidence("p0", "c", also=also, negatives=negatives),))
        batch = collate(tiny.template, [example], by_id, section)
        loss, _ = objective_loss(tiny(batch), batch, objective="nsp", lambda_=1, temperature=0.05)
        loss.backward()
        grad = tiny.emb.layers[0].self_attn.q_proj.weight.grad
        assert grad is not None
        return loss.item(), grad.clone()

    without = gradient((), ("p2",))
    accepted = gradient(("p3",), ("p2", "p3"))
    rejected = gradient((), ("p2", "p3"))
    assert accepted[0] == pytest.approx(without[0], rel=1e-12)
    torch.testing.assert_close(accepted[1], without[1])
    assert rejected[0] > without[0]


@pytest.mark.parametrize("objective", ["ntp", "nsp", "ntp+nsp"])
def test_an_objective_trains_what_it_should(
    tiny: CoSupModel, passages: list[Passage], examples: list[Example], objective: str
) -> None:
    batch = collate(tiny.template, examples, {p.id: p for p in passages}, TrainSection(objective=objective))
    loss, metrics = objective_loss(tiny(batch), batch, objective=objective, lambda_=0.5, temperature=0.05)
    loss.backward()
    trained = {name for name, part in tiny.named_children() if any(p.grad is not None for p in part.parameters())}
    assert trained == ({"gen"} if objective == "ntp" else {"gen", "emb"})
    ntp = metrics["ntp_sum"] / max(metrics["ntp_count"], 1)
    nsp = metrics.get("nsp_sum", 0.0) / metrics.get("nsp_count", 1.0)
    assert loss.item() == pytest.approx({"ntp": ntp, "nsp": nsp, "ntp+nsp": ntp + 0.5 * nsp}[objective])


def test_a_batch_without_a_retrieval_trains_ntp_alone(tiny: CoSupModel, examples: list[Example]) -> None:
    batch = collate(tiny.template, [examples[2]], {}, TrainSection())
    loss, metrics = objective_loss(tiny(batch), batch, objective="ntp+nsp", lambda_=1, temperature=0.05)
    assert loss.item() == pytest.approx(metrics["ntp_sum"] / metrics["ntp_count"])
    assert metrics["nsp_count"] == 0


def test_a_run_writes_its_recipe_metrics_curves_and_model_and_learns(recipe: dict, tmp_path: Path) -> None:
    run = train_recipe(with_train(recipe, max_steps=80), tmp_path / "run")
    rows = [row for row in rows_of(run) if "ntp" in row]
    assert len(rows) == 80
    assert {
        "grad_norm_gen",
        "grad_norm_emb",
        "ntp",
        "nsp",
        "accuracy",
        "candidates",
        "tokens_per_second",
        "grad_norm",
        "learning_rate",
    } <= set(rows[0])
    assert rows[-1]["ntp"] < rows[0]["ntp"] / 2
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "versions.json").read_text())["torch"] == version("torch")
    trained = CoSupModel.load(run, dtype="float32")
    assert trained.fingerprint


def test_a_finished_run_is_left_as_it_is_and_another_recipe_is_refused(recipe: dict, tmp_path: Path) -> None:
    run = train_recipe(with_train(recipe), tmp_path / "run")
    before = (run / "model" / "cosup.json").stat().st_mtime_ns
    train_recipe(with_train(recipe), run)
    assert (run / "model" / "cosup.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="run of another recipe"):
        train_recipe(with_train(recipe, max_steps=5), run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(recipe: dict, tmp_path: Path, dtype: str) -> None:
    settings = with_train(recipe, max_steps=8, save_steps=3, dtype=dtype)
    whole = train_recipe(settings, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train_recipe(settings, tmp_path / "resumed", callbacks=[Interrupt(5)])
    assert not (tmp_path / "resumed" / "model").exists()
    resumed = train_recipe(settings, tmp_path / "resumed")
    for part in ("gen", "emb"):
        file = Path("model") / part / "model.safetensors"
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    assert [row["step"] for row in rows_of(resumed)] == [row["step"] for row in rows_of(whole)]


@pytest.mark.parametrize("freeze", [[], ["projection"]])
def test_a_run_fits_the_projection_of_a_stranger_before_its_first_step(
    recipe: dict, tiny_stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freeze: list[str]
) -> None:
    recipe["model"]["emb"] = str(tiny_stranger)
    recipe["train"] |= {"freeze": freeze, "save_steps": 2}
    fits, fit = [], CoSupModel.fit_projection
    monkeypatch.setattr(CoSupModel, "fit_projection", lambda *it: fits.append(fit(*it)))
    told: dict[str, str] = {}
    whole = train_recipe(parse_recipe(recipe), tmp_path / "whole", on_start=told.update)
    assert "fitting the projection" in told["begins with"]
    with pytest.raises(StoppedError):
        train_recipe(parse_recipe(recipe), tmp_path / "run", callbacks=[Interrupt(3)])
    assert len(fits) == 2
    run = train_recipe(parse_recipe(recipe), tmp_path / "run")
    assert len(fits) == 2, "a checkpoint holds it, trained or not"
    found, expected = (CoSupModel.load(r, dtype="float32", device="cpu").projection for r in (run, whole))
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.weight, expected.weight)
    start = start_model(parse_recipe(recipe)).projection
    assert start is not None
    assert torch.dist(found.weight, start.weight) > 1, "it is as it was"


def test_a_checkpoint_of_before_that_lacks_a_frozen_projection_goes_on_with_it_fitted_again(
    recipe: dict, tiny_stranger: Path, tmp_path: Path
) -> None:
    recipe["model"]["emb"] = str(tiny_stranger)
    settings = with_train(recipe, freeze=["projection"], save_steps=2)
    whole = train_recipe(settings, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "before")
    shutil.rmtree(tmp_path / "before" / "model")
    shutil.rmtree(tmp_path / "before" / "checkpoints" / "checkpoint-4")
    forget_projection(tmp_path / "before" / "checkpoints" / "checkpoint-2")
    run = train_recipe(settings, tmp_path / "before")
    for file in (Path("projection.safetensors"), Path("gen") / "model.safetensors"):
        assert (run / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()


def forget_projection(checkpoint: Path) -> None:
    """Makes of a checkpoint one that an earlier version wrote."""
    file, sums = checkpoint / "model.safetensors", checkpoint / "checksums.json"
    weights = load_file(file)
    del weights["projection.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {file.name: sha256(file)}))


def test_a_run_ends_by_epochs_or_by_steps_whichever_comes_first(recipe: dict, tmp_path: Path) -> None:
    by_epochs = train_recipe(with_train(recipe, epochs=1.5, max_steps=500), tmp_path / "epochs")
    alone = train_recipe(with_train(recipe, epochs=1.5, max_steps=None), tmp_path / "alone")
    by_steps = train_recipe(with_train(recipe, epochs=1.5, max_steps=1), tmp_path / "steps")
    steps = [rows_of(run)[-1]["step"] for run in (by_epochs, alone, by_steps)]
    assert 1 < steps[0] == steps[1] < 10
    assert steps[2] == 1


def test_one_process_trains_on_one_gpu_and_says_that_others_are_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: arguments.__dict__.get("_n_gpu") or 8))
    with caplog.at_level(logging.WARNING):
        arguments = trainer._arguments(TrainSection(), tmp_path, 0, examples=100)
    assert arguments.n_gpu == 1
    assert "7 GPUs are idle" in caplog.text


@pytest.mark.parametrize(
    ("tracker", "message"),
    [("nobody", "names 'nobody', and transformers reports to .*wandb"), ("mlflow", "run `pip install mlflow`")],
)
def test_trackers_that_are_not_there_are_refused(tmp_path: Path, tracker: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer._arguments(TrainSection(report_to=(tracker,)), tmp_path, 0, examples=1)


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        ("weight_decay", 0.5, "set train.weight_decay instead"),
        ("lr_scheduler_type", "cosine", "set train.schedule instead"),
        ("warmup_steps", 100, "set train.warmup instead"),
        ("gradient_checkpointing", True, "set train.activation_checkpointing instead"),
        ("optim", "adafactor", "leave it out"),
        ("neftune_noise_alpha", 5.0, "leave it out"),
        ("label_smoothing_factor", 0.1, "leave it out"),
    ],
)
def test_fields_of_the_trainer_without_effect_are_refused(
    tmp_path: Path, field: str, value: object, instead: str
) -> None:
    with pytest.raises(UserError, match=rf"^train\.trainer\.{field} has no effect here: {instead}$"):
        trainer._arguments(TrainSection(trainer={field: value}), tmp_path, 0, examples=1)


def test_other_fields_of_the_trainer_are_taken_and_the_keys_named_instead_of_them_are_ours(tmp_path: Path) -> None:
    fields = {"dataloader_num_workers": 1, "logging_first_step": True}
    arguments = trainer._arguments(TrainSection(trainer=fields), tmp_path, 0, examples=1)
    assert (arguments.dataloader_num_workers, arguments.logging_first_step) == (1, True)
    assert set(trainer._REFUSED.values()) <= {"", *TrainSection.model_fields}


def test_the_budget_in_minutes_ends_a_run(recipe: dict, tmp_path: Path) -> None:
    run = train_recipe(with_train(recipe, max_steps=100_000, epochs=1e6, max_minutes=0.02), tmp_path / "run")
    assert 0 < rows_of(run)[-1]["step"] < 100_000
    assert (run / "model" / "cosup.json").is_file()


def test_a_run_that_the_budget_ends_is_judged_by_the_dev_set_at_its_last_step(recipe: dict, tmp_path: Path) -> None:
    recipe["data"]["dev"] = ["questions.jsonl"]
    run = train_recipe(with_train(recipe, epochs=1e6, max_steps=None, max_minutes=0.02, eval_steps=10_000), tmp_path)
    last = rows_of(run)[-1]["step"]
    assert 1 < last < 10_000
    assert [row["step"] for row in rows_of(run) if "eval_loss" in row] == [last]
    assert [checkpoint.name for checkpoint in checkpoints_in(run / "checkpoints")] == [f"checkpoint-{last}"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_examples(recipe: dict, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"(loss|norm) became (nan|inf) at step \d+ \(examples .*q\d.*no checkpoint yet"
    ):
        train_recipe(with_train(recipe, learning_rate=1e30, max_grad_norm=1e30, max_steps=9), tmp_path / "run")


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = itertools.count(1)

    def loss(*args: Any, **options: Any) -> tuple[torch.Tensor, dict[str, float]]:
        loss, metrics = objective_loss(*args, **options)
        return loss * (torch.nan if next(steps) == 5 else 1), metrics

    monkeypatch.setattr(trainer, "objective_loss", loss)
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=rf"became nan at step 5 \(examples .*\); .* is {run}/checkpoints/checkpoint-4:"
    ):
        train_recipe(with_train(recipe, save_steps=2, max_steps=9), run)
    assert not (run / "model").exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_what_is_logged_reaches_a_tracker(
    recipe: dict, tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tracker(TrainerCallback):
        logged: ClassVar[dict[str, float]] = {}

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.logged.update(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, tracker, Tracker)
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: name)
    train_recipe(with_train(recipe, report_to=[tracker], max_steps=2), tmp_path / "run")
    assert {"ntp", "nsp", "accuracy", "candidates", "grad_norm_gen", "grad_norm_emb", "tokens_per_second"} <= set(
        Tracker.logged
    )


def test_bfloat16_weights_train_with_float32_masters_and_losses(recipe: dict, tmp_path: Path) -> None:
    run = train_recipe(with_train(recipe, dtype="bfloat16", max_steps=20), tmp_path / "run")
    rows = [row for row in rows_of(run) if "ntp" in row]
    assert rows[-1]["ntp"] < rows[0]["ntp"]
    norms = torch.tensor([row["grad_norm"] for row in rows], dtype=torch.float64)
    assert (norms.bfloat16().double() != norms).any()  # not rounded to it, as the gradients are


def test_master_weights_keep_steps_that_bfloat16_would_lose_and_survive_saving() -> None:
    def train(steps: int, optimizer: MasterAdamW, weight: torch.nn.Parameter) -> None:
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()

    plain = torch.nn.Parameter(torch.full((4, 4), 256.0, dtype=torch.bfloat16))
    optimizer = MasterAdamW([{"params": [plain], "weight_decay": 0.0}], lr=0.01)
    train(100, optimizer, plain)
    assert plain[0, 0].item() == 255.0  # 100 steps of 0.01, each of which bfloat16 alone would round away

    again = torch.nn.Parameter(plain.detach().clone())
    restored = MasterAdamW([{"params": [again], "weight_decay": 0.0}], lr=0.5)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.param_groups[0]["lr"] == 0.01
    train(150, optimizer, plain)
    train(150, restored, again)
    assert torch.equal(plain, again)


def test_the_rate_rises_then_falls_to_zero() -> None:
    linear = rate_at(TrainSection(warmup=0.1, schedule="linear"))
    assert linear(0.05) == pytest.approx(0.5)
    assert linear(0.1) == pytest.approx(1.0)
    assert linear(0.55) == pytest.approx(0.5)
    assert linear(1.0) == pytest.approx(0.0)
    cosine = rate_at(TrainSection(warmup=0.0, schedule="cosine"))
    assert [cosine(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert rate_at(TrainSection(warmup=0.0, schedule="constant"))(0.99) == 1.0


def test_examples_that_are_too_long_are_left_out_and_counted(recipe: dict, tiny: CoSupModel) -> None:
    raw = parse_recipe({**recipe, "data": recipe["data"] | {"max_tokens": 80}})
    data = load_data(raw, tiny.template)
    assert data.left_out["longer than 80 tokens"] > 0
    lengths = [len(data.examples[row].ids) for row in range(len(data.examples))]
    assert 0 < max(lengths) <= 80
    shorter = load_data(raw, tiny.template, context=60)
    assert len(shorter.examples) < len(lengths)
    assert max(len(shorter.examples[row].ids) for row in range(len(shorter.examples))) <= 60


def test_examples_longer_than_gen_reads_are_left_out_and_passages_longer_than_emb_reads_refused(
    recipe: dict, tiny_lm: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.save_pretrained(short)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=80)
    ).save_pretrained(short)
    raw = {**recipe, "model": {"gen": str(short)}}
    with pytest.raises(UserError, match="max_passage_tokens is 256, and Emb_seq reads at most 80 tokens: lower it"):
        start_model(parse_recipe(raw))
    data = recipe["data"] | {"max_passage_tokens": 60}  # max_tokens stays at 1,024, far beyond the 80 positions
    assert rows_of(train_recipe(with_train({**raw, "data": data}), tmp_path / "run"))[-1]["step"] == 4


def test_nothing_to_train_on_and_dangling_citations_are_refused(corpus: Path, recipe: dict, tiny: CoSupModel) -> None:
    write_records(corpus / "questions.jsonl", [Question("q", "squad", "?", answers=["a"])])
    only = {**recipe, "data": recipe["data"] | {"train": ["questions.jsonl"]}}
    with pytest.raises(UserError, match=r"nothing to train on.*no gold passage"):
        load_data(parse_recipe(only), tiny.template)
    judged = {**recipe, "data": recipe["data"] | {"dev": ["questions.jsonl"], "train": ["examples.jsonl"]}}
    with pytest.raises(UserError, match=r"nothing to judge by in data.dev.*no gold passage"):
        load_data(parse_recipe({**judged, "train": recipe["train"] | {"eval_steps": 2}}), tiny.template)
    write_records(corpus / "questions.jsonl", [Question("q", "squad", "?", answers=["a"], gold=["p99"])])
    with pytest.raises(UserError, match="cites passage 'p99'"):
        load_data(parse_recipe(only), tiny.template)


def test_unknown_trainer_fields_and_those_of_the_recipe_are_refused(recipe: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nonsense"):
        train_recipe(with_train(recipe, trainer={"nonsense": 1}), tmp_path / "a")
    assert not (tmp_path / "a" / "recipe.yaml").exists(), "the corrected recipe would be refused as another one"
    with pytest.raises(UserError, match=r"train.trainer.learning_rate is set by the recipe"):
        train_recipe(with_train(recipe, trainer={"learning_rate": 1}), tmp_path / "b")


def test_only_run_folders_are_removed(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        remove_run(tmp_path / "notes")
    remove_run(tmp_path / "absent")


def test_cosine_scores_what_dot_scores_once_its_vectors_are_normalised(
    tiny: CoSupModel, passages: list[Passage]
) -> None:
    cosine_PD = tiny.embed_passages(passages[:3])
    tiny.settings = tiny.settings.model_copy(update={"similarity": "dot"})
    dot_PD = tiny.embed_passages(passages[:3])
    norms_P1 = np.linalg.norm(dot_PD, axis=1, keepdims=True)
    assert not np.allclose(norms_P1, 1, atol=0.1)
    np.testing.assert_allclose(dot_PD / norms_P1, cosine_PD, atol=1e-6)


def test_neighbours_stand_together_every_example_comes_once_and_epochs_differ() -> None:
    titles = [f"title {i % 7}" for i in range(70)]
    sampler = NeighbourSampler(titles, size=5, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(70))
    groups = [first[i : i + 5] for i in range(0, 70, 5)]
    assert all(len({titles[row] for row in group}) == 1 for group in groups)
    assert len({titles[group[0]] for group in groups[:4]}) > 1
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    alone = list(NeighbourSampler(titles, size=1, seed=0))
    assert sum(titles[a] == titles[b] for a, b in itertools.pairwise(alone)) < 25


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--main_process_port", "29512", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "chunk"), [(TORCHRUN, None), (TORCHRUN, 1), (ACCELERATE, None)])
def test_two_launched_processes_train_like_one(
    recipe: dict, tmp_path: Path, launcher: list[str], chunk: int | None
) -> None:
    raw = recipe | {"train": recipe["train"] | {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-3}}
    raw["train"] |= {"chunk_size": chunk, "batch_size": 2}
    raw["data"] = raw["data"] | {"only_with_retrieval": True}  # leaves six, which two processes share evenly
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    train_recipe(parse_recipe(raw), tmp_path / "one")
    trained = ["-m", "cosup.cli", "train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two")]
    command = [sys.executable, "-m", *launcher, *trained]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = ([row for row in rows_of(tmp_path / run) if "ntp" in row] for run in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for name in ("ntp", "nsp", "grad_norm", "candidates", "accuracy"):
        assert [row.get(name) for row in two] == pytest.approx([row.get(name) for row in one], rel=1e-3), name
    assert CoSupModel.load(tmp_path / "two").fingerprint
