import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train import corpus, recipe, rows_of, with_train

from cosup.config import UserError
from cosup.model import CoSupModel
from cosup.train import train_recipe
from cosup.train.checkpoints import UNFINISHED, finish_checkpoint, load_trained, newest_checkpoint, save_trained

__all__ = ["corpus", "recipe"]  # fixtures


def checkpoint(folder: Path, step: int) -> Path:
    written = folder / UNFINISHED / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "model.safetensors").write_bytes(bytes([step] * 100))
    finish_checkpoint(folder, step, best=None)
    return folder / f"checkpoint-{step}"


def test_only_what_is_trained_is_written_and_put_back(tiny: CoSupModel, tmp_path: Path) -> None:
    tiny.emb.requires_grad_(False)
    tiny.gen.model.layers[0].requires_grad_(False)
    save_trained(tiny, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved
    assert not any(name.startswith(("emb.", "gen.model.layers.0.")) for name in saved)
    weight = tiny.gen.model.layers[1].mlp.up_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    load_trained(tiny, tmp_path)
    assert torch.equal(weight, before)


def test_a_checkpoint_of_another_model_is_refused(tiny: CoSupModel, tmp_path: Path) -> None:
    save_trained(tiny, tmp_path)
    tiny.emb.requires_grad_(False)
    with pytest.raises(UserError, match="weights of another model"):
        load_trained(tiny, tmp_path)


def test_the_last_two_are_kept_and_the_best(tmp_path: Path) -> None:
    best = checkpoint(tmp_path, 5)
    for step in (10, 15, 100):
        (tmp_path / UNFINISHED / f"checkpoint-{step}").mkdir(parents=True)
        finish_checkpoint(tmp_path, step, best=best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-15", "checkpoint-5"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, newest = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newest
    file = newest / "model.safetensors"
    if damage == "flip":
        file.write_bytes(b"x" + file.read_bytes()[1:])
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:50])
    elif damage == "remove":
        file.unlink()
    else:
        (newest / "checksums.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == whole
    assert f"{newest} is damaged" in caplog.text
    shutil.rmtree(whole)
    assert newest_checkpoint(tmp_path) is None


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_the_same(recipe: dict, tmp_path: Path) -> None:
    settings = with_train(recipe, max_steps=8, save_steps=3)
    whole = train_recipe(settings, tmp_path / "whole")
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "model")
    newest = sorted((again / "checkpoints").iterdir())[-1]
    (newest / "optimizer.pt").write_bytes(b"not an optimizer")
    (again / "checkpoints" / UNFINISHED / "checkpoint-7").mkdir(parents=True)  # as a killed process leaves it
    with (again / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 9, "ntp"')  # as a full disk leaves it
    train_recipe(settings, again)
    for part in ("gen", "emb"):
        file = Path("model") / part / "model.safetensors"
        assert (whole / file).read_bytes() == (again / file).read_bytes()
    assert [row["step"] for row in rows_of(again)] == [row["step"] for row in rows_of(whole)]


@pytest.mark.slow
def test_a_run_killed_at_five_random_steps_ends_with_the_weights_of_an_uninterrupted_one(
    recipe: dict, tmp_path: Path
) -> None:
    raw = recipe | {"train": recipe["train"] | {"max_steps": 40, "save_steps": 3, "neighbours": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    steps = sorted(random.Random(time.time_ns()).sample(range(2, 38), 5))
    for step in steps:
        process = start(tmp_path, "killed")
        wait_for_step(process, tmp_path / "killed", step)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "model").exists(), f"not killed in time at {steps}"
    for name in ("killed", "whole"):
        process = start(tmp_path, name)
        wait_until(process, lambda process=process: process.poll() is not None)
        assert process.returncode == 0, (tmp_path / "stderr.txt").read_text()
    for part in ("gen", "emb"):
        file = Path("model") / part / "model.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), (
            f"killed at {steps}"
        )
    assert [row["step"] for row in rows_of(tmp_path / "killed")] == [row["step"] for row in rows_of(tmp_path / "whole")]


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cosup.cli", "train", str(folder / "recipe.yaml"), "--out", str(folder / name)]
    # one thread: several of them wait for each other by spinning, which takes long where others use the cores
    environment = os.environ | {"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "stderr.txt").open("wb") as stderr:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    def reached() -> bool:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []
        return bool(lines) and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step

    wait_until(process, lambda: reached() or process.poll() is not None)
    assert process.poll() is None, f"the run ended before step {step}"


def wait_until(process: subprocess.Popen[bytes], happened: Callable[[], bool], *, seconds: float = 240) -> None:
    """Waits; a process that hangs is made to say where, in every thread."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            process.send_signal(signal.SIGABRT)
            process.wait()
            told = Path(str(process.args[-1])).parent / "stderr.txt"
            pytest.fail(f"nothing happened for {seconds} s: {told.read_text()}")
        time.sleep(0.01)
