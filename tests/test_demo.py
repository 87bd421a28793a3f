"""The demo and a few steps on SmolLM2-135M itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosup.config import UserError, parse_recipe
from cosup.data import read_questions, write_records
from cosup.data.worldfacts import build_worldfacts
from cosup.demo import Demo
from cosup.model import CoSupModel
from cosup.train import train_recipe


def run_demo(folder: Path, *more: str) -> str:
    command = [sys.executable, "-m", "cosup.cli", "demo", "--out", str(folder), "--minutes", "0.05", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_answers_trains_answers_again_and_reuses_what_is_finished(
    tiny_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSUP_MODEL", str(tiny_adapters))
    folder = tmp_path / "demo"
    first = run_demo(folder)
    for expected in ("before", "after", "BM25 success@1", "cosup ingest", str(folder)):
        assert expected in first
    assert first.count("\n? ") == 10
    figures = json.loads((folder / "after" / "figures.json").read_text())
    assert figures["forced_success@1"]["count"] > 100
    trained = (folder / "run" / "model" / "cosup.json").stat().st_mtime_ns
    assert run_demo(folder).split("Before and after")[1] == first.split("Before and after")[1]
    assert (folder / "run" / "model" / "cosup.json").stat().st_mtime_ns == trained


def test_start_over_removes_a_demo_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    demo = Demo(tmp_path / "notes", minutes=1, counter=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not the folder of a demo"):
        demo.start_over()
    assert (tmp_path / "notes" / "mine.txt").exists()
    file = Demo(tmp_path / "notes" / "mine.txt", minutes=1, counter=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not the folder of a demo"):
        file.start_over()
    mine = Demo(tmp_path / "demo", minutes=1, counter=None)  # type: ignore[arg-type]
    mine.build_data()
    mine.start_over()
    assert not (tmp_path / "demo").exists()


def test_the_shown_questions_are_five_of_all_kinds_from_the_test_split(tmp_path: Path) -> None:
    demo = Demo(tmp_path / "demo", minutes=1, counter=None)  # type: ignore[arg-type]
    demo.build_data()
    shown = demo.shown()
    assert len({question.id for question in shown}) == 5
    assert {question.task for question in shown} == {
        "worldfacts-qa", "worldfacts-slot", "worldfacts-hop", "worldfacts-claim"
    }  # fmt: skip


def test_smollm2_trains_saves_and_answers(tmp_path: Path) -> None:
    build_worldfacts(tmp_path / "facts")
    write_records(tmp_path / "facts" / "few.jsonl", list(read_questions(tmp_path / "facts" / "train.jsonl"))[:2])
    recipe = parse_recipe(
        {
            "name": "few-steps",
            "data": {"folder": str(tmp_path / "facts"), "train": ["few.jsonl"], "passages": ["passages.jsonl"]},
            "train": {"batch_size": 2, "max_steps": 4, "epochs": 9, "log_steps": 1, "learning_rate": 1e-4},
        }
    )
    run = train_recipe(recipe, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[3]["ntp"] < rows[0]["ntp"]
    model = CoSupModel.load(run)
    assert model.dim == 576
    assert model.template.decode(model.template.encode("Norges hovedstad — 오슬로")) == "Norges hovedstad — 오슬로"
