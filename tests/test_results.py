"""The kept figures of experiments and the page that is written of them."""

import json
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "experiments" / "results.py"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = spec_from_file_location("results", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path / "results")
    monkeypatch.setattr(module, "PAGE", tmp_path / "results.md")
    (tmp_path / "results").mkdir()
    return module


def figure(value: float | None) -> dict[str, Any]:
    return {"value": value, "count": 40, "low": None if value is None else value - 0.1, "high": value}


def judged(run: Path, found: dict[str, float | None], **settings: Any) -> None:
    """An evaluation run of NQ."""
    (run / "nq").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"name": run.name, "mode": "cosup", "tasks": {"nq": {}}} | settings))
    (run / "nq" / "figures.json").write_text(json.dumps({key: figure(value) for key, value in found.items()}))


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    folder = tmp_path / "experiment"
    for name, correct in {"released-0": 0.5, "released-none-0": 0.25}.items():
        found = {"forced_success@1": 0.625, "bm25_success@1": 0.375, "answer_in_text": correct, "well_formed": 1.0}
        settings = {"index": {"passages": 5000}, "options": {"max_new_tokens": 17}}
        judged(folder / "evaluations" / name, found | {"claim_words": None}, **settings)
    (folder / "cells.md").write_text("")
    (folder / "baselines.json").write_text(json.dumps({"all-minilm-l6-v2": {"nq": {"value": 0.75, "count": 40}}}))
    return folder


def run(results: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["results.py", *arguments])
    results.main()


def test_what_is_kept_is_what_the_page_shows(
    results: ModuleType, experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(results, monkeypatch, "--keep", str(experiment), "--as", "some", "--hardware", "a slide rule")
    page = results.PAGE.read_text()
    assert "retrieval among 5,000 passages" in page
    assert "a slide rule" in page
    assert "| NQ | 40 | 0.625 [0.525, 0.625] |  |  | 0.375 | 0.750 |" in page
    assert "at most 17 tokens" in page
    assert "| NQ | 40 | 0.500 [0.400, 0.500] | answer presence in the whole answer | 1.000 |  |  |" in page
    assert "| NQ | 0.500 | 0.250 |" in page
    assert "<svg" in results.PAGE.with_suffix(".svg").read_text()
    run(results, monkeypatch, "--check")
    results.PAGE.write_text(page + "by hand")
    with pytest.raises(SystemExit, match="stale"):
        run(results, monkeypatch, "--check")


def test_a_comparison_shows_its_cells_every_condition_and_what_the_training_took(
    results: ModuleType, experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(experiment / "evaluations" / "released-none-0")
    shutil.rmtree(experiment / "evaluations" / "released-0")
    runs = {
        "cosup-0": {"forced_success@1": 0.625, "bm25_success@1": 0.375, "answer_in_text": 0.5},
        "separate-0": {"forced_success@1": 0.5},
        "cosup-bm25-0": {"forced_success@1": 1, "answer_in_text": 0.125},
    }
    rows = [{"step": 5, "minutes": 1.0, "tokens_per_second": 100.0}]
    rows += [{"step": 8, "minutes": 1.5, "tokens_per_second": 300.0}, {"step": 8, "minutes": 1.5}]
    for name, found in runs.items():
        training = {"name": name if name == "separate-0" else "cosup-0", "objective": "separate"}
        mode = "bm25" if "bm25" in name else "cosup"
        settings = {"mode": mode, "training": training, "index": {"passages": 5000}}
        judged(experiment / "evaluations" / name, found, **settings)
        log = experiment / "evaluations" / name / "training.jsonl"
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (experiment / "cells.md").write_text("| the cells |\n")
    (experiment / "sweeps.md").write_text("| the sweeps |\n")
    run(results, monkeypatch, "--keep", str(experiment), "--as", "main", "--hardware", "a slide rule")
    page = results.PAGE.read_text()
    assert "## Co-supervision against separate training, 8 steps of about 1,875 tokens, 5,000 passages searched" in page
    assert "| the cells |" in page
    assert "|  | NQ |\n|---|--:|\n| cosup | 0.625 |\n| separate | 0.500 |\n| BM25 | 0.375 |\n| all-Mini" in page
    assert "NQ: answer presence in the whole answer:\n" in page
    assert "| cosup | 0.500 |\n| cosup-bm25 | 0.125 |\n| separate |  |" in page
    assert "| the sweeps |" in page
    assert "| separate-0 | separate | 8 | 15,000 | 1.5 |" in page
    assert "| cosup-bm25-0 |" not in page
    assert "released model" not in page
    (experiment / "cells.md").write_text("")
    run(results, monkeypatch, "--keep", str(experiment), "--as", "main", "--hardware", "a slide rule")
    page = results.PAGE.read_text()
    assert "## One setting changed, 8 steps of about 1,875 tokens, 5,000 passages searched" in page
    assert "against separate training" not in page
    assert "| separate-0 | separate | 8 | 15,000 | 1.5 |" in page


def test_runs_of_another_folder_are_added_to_those_that_are_kept(
    results: ModuleType, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = "| condition | retrieval |\n|---|--:|\n| cosup | 0.5 |\n"
    (experiment / "sweeps.md").write_text(table + "| one | 0.25 |\n")
    run(results, monkeypatch, "--keep", str(experiment), "--as", "some", "--command", "one")
    shutil.copytree(experiment, tmp_path / "more")
    shutil.rmtree(tmp_path / "more" / "evaluations" / "released-0")
    shutil.rmtree(tmp_path / "more" / "evaluations" / "released-none-0")
    (tmp_path / "more" / "sweeps.md").write_text(table + "| two | 0.75 |\n")
    settings = {"index": {"passages": 5000}, "options": {"max_new_tokens": 17}}
    judged(tmp_path / "more" / "evaluations" / "released-bm25-0", {"answer_in_text": 0.125}, mode="bm25", **settings)
    run(results, monkeypatch, "--keep", str(tmp_path / "more"), "--as", "some", "--add", "--command", "both")
    kept = json.loads((results.HERE / "some.json").read_text())
    assert sorted(kept["runs"]) == ["released-0", "released-bm25-0", "released-none-0"]
    assert kept["sweeps"] == table + "| one | 0.25 |\n| two | 0.75 |\n"
    assert (kept["command"], kept["baselines"]["all-minilm-l6-v2"]["nq"]["value"]) == ("both", 0.75)
    assert "0.125" in results.PAGE.read_text()


def test_the_model_as_it_comes_stands_beside_the_model_by_itself(
    results: ModuleType, experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(results, monkeypatch, "--keep", str(experiment), "--as", "some")
    head = "| data set | n | success@1, forced | success@5 | success@1, free |"
    assert f"{head} BM25, success@1 | all-MiniLM-L6-v2 |" in results.PAGE.read_text()
    assert "Its answers as it comes" not in results.PAGE.read_text()
    for name, found in {"hybrid": 0.8125, "as-it-comes": 0.875}.items():
        figures = {"forced_success@1": found, "answer_in_text": found, "well_formed": 0.96875}
        judged(experiment / "evaluations" / f"released-{name}-0", figures, options={"max_new_tokens": 17})
    run(results, monkeypatch, "--keep", str(experiment), "--as", "some")
    page = results.PAGE.read_text()
    assert f"{head} as it comes | BM25, success@1 | all-MiniLM-L6-v2 |" in page
    assert "| 0.875 | 0.375 | 0.750 |" in page
    assert page.index("Its answers as it comes") < page.index("| 0.969 |") < page.index("Its answers by itself")
    assert "| where it asks, `--hybrid 0.2` | as it comes: that and `--statements` |" in page
    assert "| NQ | 0.500 | 0.250 | 0.812 | 0.875 |" in page


def test_runs_are_added_to_nothing_but_what_is_kept(
    results: ModuleType, experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(results, monkeypatch, "--keep", str(experiment), "--as", "other", "--add")
    assert "there are none in" in capsys.readouterr().err


def test_losses_are_shown_as_far_as_all_runs_got(
    results: ModuleType, experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, ntp, steps in (("cosup-0", 2.0, 5), ("cosup-1", 4.0, 5), ("separate-0", 1.0, 4), ("separate-1", 1.5, 5)):
        rows: list[dict[str, Any]] = [
            {"step": 10 * step, "ntp": ntp * step, "nsp": 1.0, "accuracy": 0.5} for step in range(1, steps + 1)
        ]
        (experiment / "runs" / name).mkdir(parents=True)
        rows.append({"step": 10 * steps, "train_runtime": 1.0})
        (experiment / "runs" / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(results, monkeypatch, "--keep", str(experiment), "--losses", "--as", "main", "--hardware", "a slide rule")
    page = results.PAGE.read_text()
    assert "Losses of longer training, 2 seeds" in page
    assert "up to step 40, which all runs reached" in page
    assert "| 10 | 3.000 | 1.250 | 1.000 | 1.000 | 0.500 | 0.500 |" in page
    assert "| 40 | 12.000 | 5.000 |" in page
    assert "<svg" in results.PAGE.with_name("losses.svg").read_text()
    run(results, monkeypatch, "--check")


def test_a_run_that_is_not_finished_is_not_kept(
    results: ModuleType, experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, missing in (
        (experiment, "cells.md"),
        (experiment, "evaluations/released-none-0/nq/figures.json"),
        (experiment / "nowhere", "evaluations/*/run.json"),
    ):
        (folder / missing).unlink(missing_ok=True)
        with pytest.raises(SystemExit) as refused:
            run(results, monkeypatch, "--keep", str(folder), "--as", "some")
        assert refused.value.code == 2
        assert missing in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        run(results, monkeypatch, "--keep", str(experiment), "--losses", "--as", "some")
    assert refused.value.code == 2
    assert "runs/cosup-0/metrics.jsonl is missing" in capsys.readouterr().err
    assert not list(results.HERE.iterdir())
