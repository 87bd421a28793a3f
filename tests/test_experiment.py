"""The experiment, from data to the table of cells, on a tiny model."""

import gzip
import json
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cosup.config import UserError
from cosup.data import Passage, Question, read_examples, write_records
from cosup.data.records import QAPair
from cosup.evaluate import Evaluation
from cosup.model import AnswerSettings
from cosup.report.load import Run

PATH = Path(__file__).parents[1] / "experiments" / "run.py"


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    spec = spec_from_file_location("experiment", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def question(number: int, task: str, split: str) -> Question:
    """Each with a gold passage of its own."""
    more: dict[str, Any] = {"label": "SUPPORTS"} if task == "fever" else {}
    more |= {"qa_pairs": [QAPair("Which city?", [f"city {number}"])]} if task == "asqa" else {}
    return Question(
        f"{split}-{task}-{number}",
        task,
        f"Which city is {number} in {split} {task}?",
        answers=["SUPPORTS"] if task == "fever" else [f"city {number}"],
        gold=[f"{split}-{task}-{number}"],
        **more,
    )


@pytest.fixture
def source(tmp_path: Path, experiment: ModuleType) -> Path:
    folder = tmp_path / "data"
    learnt = ("squad", "newwiki", "fever", "fm2", "selqa", "hotpotqa", "musique")
    tasks = {"train": learnt, "dev": experiment.RETRIEVAL}
    everything = []
    for split, names in tasks.items():
        for name in names:
            asked = [question(i, name, split) for i in range(4)]
            write_records(folder / split / f"{name}.jsonl.gz", asked)
            everything += [
                Passage(q.gold[0], f"The city {q.id} lies at the river {q.id}.", f"City {q.id}") for q in asked
            ]
    write_records(folder / "corpus.jsonl.gz", everything)
    return folder


def test_other_settings_in_the_folder_of_an_experiment_are_refused(experiment: ModuleType, tmp_path: Path) -> None:
    drawn = {"questions": 3, "passages": 80, "set": []}
    for _ in range(2):
        experiment.refuse_another(tmp_path, drawn)
    with pytest.raises(UserError, match=r"holds an experiment with .*name another folder with --out"):
        experiment.refuse_another(tmp_path, drawn | {"questions": 4})


def test_the_main_comparison_comes_first_and_everything_once(experiment: ModuleType) -> None:
    found = experiment.jobs(["untrained", "cosup", "separate"], [3, 4])
    assert found == [
        ("cosup", 3, "cosup"),
        ("separate", 3, "cosup"),
        ("cosup", 4, "cosup"),
        ("separate", 4, "cosup"),
        ("untrained", 3, "cosup"),
        ("cosup", 3, "static"),
        ("cosup", 3, "none"),
        ("separate", 3, "bm25"),
    ]


def test_what_goes_on_with_a_model_waits_for_the_wave_that_trains_it(experiment: ModuleType) -> None:
    jobs = experiment.jobs(["cosup", "separate", "hard-negatives"], [0, 1])
    first, second = experiment.waves(jobs, 4)
    assert first == [("cosup", 0, "cosup"), ("separate", 0, "cosup"), ("cosup", 1, "cosup"), ("separate", 1, "cosup")]
    assert second == [
        ("cosup", 0, "static"),
        ("cosup", 0, "none"),
        ("separate", 0, "bm25"),
        ("hard-negatives", 0, "cosup"),
    ]
    assert experiment.waves(jobs, 1) == [jobs]


def test_an_evaluation_that_was_interrupted_is_left_out(experiment: ModuleType, tmp_path: Path) -> None:
    for name, judged in {"cosup-0": ("nq", "wow"), "cosup-1": ("nq",)}.items():
        for task in judged:
            (tmp_path / name / task).mkdir(parents=True)
            (tmp_path / name / task / "figures.json").write_text("{}")
        (tmp_path / name / "run.json").write_text(json.dumps({"tasks": {"nq": {}, "wow": {}}}))
    assert experiment.finished(tmp_path) == [tmp_path / "cosup-0"]


def condition(experiment: ModuleType, name: str, right: list[list[float]]) -> Any:
    """Of each data set two questions, scored alike in every figure of it; one row a seed."""
    answers = {task: experiment.HEADLINES[task].correctness[0] for task in experiment.CORRECTNESS}
    runs = []
    for seed, scores in enumerate(right):
        evaluations = {}
        for task in experiment.RETRIEVAL:
            figures = ["forced_success@1", *([answers[task]] if task in answers else [])]
            items = [{"id": f"q{i}", "scores": dict.fromkeys(figures, score)} for i, score in enumerate(scores)]
            evaluations[task] = Evaluation({}, items)
        runs.append(Run(name, Path(name), {"training": {"seed": seed}}, evaluations, {}, []))
    return experiment.Condition(name, tuple(runs))


def test_cells_compare_the_same_questions_over_all_seeds(experiment: ModuleType) -> None:
    ours, theirs = condition(experiment, "cosup", [[1, 1], [1, 0]]), condition(experiment, "separate", [[0, 1], [1, 0]])
    told = experiment.cells([ours, theirs])
    assert "| SQuAD, retrieval success@1, forced | 2 | 0.750 | 0.500 | +0.250 |" in told
    assert "in 13 of 13 cells" in told
    assert "- retrieval: +0.2500, 95 % interval" in told
    assert "(14 questions, 2 seeds)" in told
    assert "(12 questions, 2 seeds)" in told
    assert "in 0 of 13 cells" in experiment.cells([condition(experiment, "cosup", [[0, 0]]), theirs])
    assert experiment.cells([ours]) == ""


def test_cells_compare_the_seeds_that_both_conditions_have(experiment: ModuleType) -> None:
    ours, theirs = condition(experiment, "cosup", [[1, 1], [1, 0]]), condition(experiment, "separate", [[0, 1], [1, 0]])
    backwards = replace(theirs, runs=theirs.runs[::-1])
    assert experiment.cells([ours, backwards]) == experiment.cells([ours, theirs])
    second = replace(theirs, runs=theirs.runs[1:])
    alone = replace(ours, runs=ours.runs[1:])
    assert experiment.cells([ours, second]) == experiment.cells([alone, second])
    with pytest.raises(UserError, match="'cosup' and 'separate' have no seed in common"):
        experiment.cells([replace(ours, runs=ours.runs[:1]), second])


def test_mined_negatives_for_every_condition_are_refused(
    experiment: ModuleType, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run.py", "--data", str(source), "--out", str(tmp_path / "out"), "--set", "train.negatives=4"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError, match="the condition hard-negatives"):
        experiment.main()
    assert not (tmp_path / "out").exists()


def test_sweeps_compare_with_the_first_seed_of_co_supervision(experiment: ModuleType) -> None:
    ours, swept = condition(experiment, "cosup", [[1, 1], [0, 0]]), condition(experiment, "lambda-5", [[0, 1]])
    untrained, separate = (condition(experiment, name, [[1, 0], [0, 0]]) for name in ("untrained", "separate"))
    told = experiment.sweeps([ours, untrained, separate, swept])
    assert "| cosup | 1.000 |  | 1.000 |  |" in told
    assert "| lambda-5 | 0.500 | -0.500 [-0.7" in told
    assert "| separate | 0.500 | -0.500 [-0.7" in told
    assert "untrained" not in told
    assert experiment.sweeps([ours]) == experiment.sweeps([swept]) == ""


@pytest.mark.slow
def test_conditions_are_trained_judged_compared_and_not_done_twice(
    experiment: ModuleType, source: Path, tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["run.py", "--data", str(source), "--out", str(out), "--seeds", "0", "1", "--questions", "3"]
    command += ["--passages", "80", "--only", "cosup", "separate", "hard-negatives"]
    command += ["--set", f"model.gen={tiny_lm}", "--set", "train.max_steps=2", "--set", "train.batch_size=4"]
    monkeypatch.setattr(sys, "argv", command)
    experiment.main()
    told = (out / "cells.md").read_text()
    assert "Co-supervision is at least as good in" in told
    assert all(f"- {part}: " in told for part in ("retrieval", "answers", "both"))
    assert json.loads((out / "baselines.json").read_text())["all-minilm-l6-v2"]["squad"]["count"] == 3
    assert (out / "evaluations" / "cosup-0" / "squad-gold" / "figures.json").is_file()
    assert not (out / "evaluations" / "hard-negatives-0" / "squad-gold").exists()
    assert "| hard-negatives | " in (out / "sweeps.md").read_text()
    trained = ["cosup-0", "cosup-1", "hard-negatives-0", "separate-0", "separate-1"]
    assert sorted(path.name for path in (out / "runs").iterdir()) == trained
    judged = sorted([*trained, "cosup-static-0", "cosup-none-0", "separate-bm25-0"])
    assert sorted(path.name for path in (out / "evaluations").iterdir()) == judged
    mined = list(read_examples(out / "data" / "mined.jsonl"))
    assert any(part.negatives for example in mined for part in example.evidence)
    finished = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")}
    experiment.main()
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.safetensors")} == finished


def test_training_on_what_is_judged_is_refused(experiment: ModuleType, source: Path, tmp_path: Path) -> None:
    with gzip.open(source / "train" / "squad.jsonl.gz", "at") as file:
        file.write(json.dumps({"id": "x", "task": "squad", "question": "WHICH CITY IS 1 in dev nq?"}) + "\n")
    with pytest.raises(UserError, match="'x' or its passage is in the evaluation"):
        experiment.Data(source, tmp_path / "made", questions=4, passages=50).make()
    assert not (tmp_path / "made" / "passages.jsonl").exists()
    other = experiment.Data(source, tmp_path / "other", questions=4, passages=50)
    with pytest.raises(UserError, match="is in the evaluation"):
        other.make(["data.train=[dev/nq.jsonl.gz]"])


def test_conditions_are_judged_by_themselves_and_the_released_model_as_it_comes_too(experiment: ModuleType) -> None:
    own = AnswerSettings(statements=True, hybrid=0.2)
    found = {way: experiment.settings_of(way, "x").options.settled(own) for way in experiment.MODES["released"]}
    comes = found.pop("as-it-comes")
    assert (comes.statements, comes.hybrid, comes.mode) == (True, 0.2, "cosup")
    assert all((options.statements, options.hybrid) == (False, 0.0) for options in found.values())
    assert {(options.max_new_tokens, options.rows) for options in [comes, *found.values()]} == {(64, experiment.ROWS)}
