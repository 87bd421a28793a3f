"""Evaluation runs as they lie on disk, and the conditions that they are repetitions of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cosup.config import UserError
from cosup.data import Passage, read_passages
from cosup.evaluate import Evaluation, Figure
from cosup.metrics.statistics import Values, bootstrap_intervals


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluation run.

    Args:
        name: its condition, and its seed where other runs share that.
        folder: where it lies.
        settings: `run.json`.
        evaluations: by data set; only those that are finished.
        passages: by data set, those that its answers name.
        curves: the metrics of the model's training, where they are known.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    evaluations: dict[str, Evaluation]
    passages: dict[str, list[Passage]]
    curves: list[dict[str, Any]]

    @property
    def training(self) -> dict[str, Any]:
        """What is known of the model's training; empty where nothing is."""
        return self.settings.get("training") or {}


@dataclass(frozen=True, slots=True)
class Condition:
    """Runs that differ only in the seed of their training."""

    name: str
    runs: tuple[Run, ...]

    @property
    def tasks(self) -> list[str]:
        """Data sets that every run has finished."""
        return [task for task in self.runs[0].evaluations if all(task in run.evaluations for run in self.runs)]

    def figure(self, task: str, name: str) -> Figure | None:
        """A figure of a data set; over several seeds its mean, and the interval of that mean over questions alone.

        The interval is absent where the figure is no mean over questions. None where no run has the figure, and one
        without a value where some have not.
        """
        if task not in self.tasks:
            return None
        figures = [run.evaluations[task].figures.get(name) for run in self.runs]
        known = [figure for figure in figures if figure is not None and figure.value is not None]
        if all(figure is None for figure in figures):
            return None
        if len(known) < len(self.runs):
            return Figure(None, 0)
        if len(known) == 1:
            return known[0]
        mean = Figure(float(np.mean([figure.value for figure in known])), known[0].count)
        if any(figure.low is None for figure in known) or not (ids := self.ids(task, name)):
            return mean
        ((low, high),) = bootstrap_intervals(self.scores(task, name, ids).mean(0)[:, None])
        return replace(mean, low=float(low), high=float(high))

    def scores(self, task: str, name: str, ids: Sequence[str]) -> Values:
        """float64 [S, Q]: a score of these questions in each run."""
        rows = []
        for run in self.runs:
            by_id = {item["id"]: item["scores"] for item in run.evaluations[task].items}
            rows.append([by_id[id][name] for id in ids])
        return np.array(rows, np.float64)

    def ids(self, task: str, name: str) -> list[str]:
        """The questions that have this score in every run."""
        found = [[item["id"] for item in run.evaluations[task].items if name in item["scores"]] for run in self.runs]
        common = set(found[0]).intersection(*found)
        return [id for id in found[0] if id in common]


def read_run(folder: Path) -> Run:
    """Opens a run folder of `cosup evaluate`.

    Raises:
        UserError: there is none, or no data set of it is finished.
    """
    try:
        settings = json.loads((folder / "run.json").read_text("utf-8"))
        finished = [task for task in settings["tasks"] if (folder / task / "figures.json").is_file()]
        evaluations = {task: Evaluation.load(folder / task) for task in finished}
        curves = folder / "training.jsonl"
        rows = [json.loads(line) for line in curves.read_text("utf-8").splitlines()] if curves.is_file() else []
    except FileNotFoundError:
        raise UserError(f"there is no evaluation run at {folder}: make one with `cosup evaluate --out`") from None
    except (ValueError, KeyError, TypeError, NotADirectoryError) as e:
        raise UserError(f"{folder} is no evaluation run, or a damaged one ({e}); evaluate again") from None
    if not finished:
        raise UserError(f"{folder} has no finished data set; go on with `cosup evaluate --out {folder}`")
    passages = {task: list(read_passages(folder / task / "passages.jsonl")) for task in finished}
    return Run(str(settings.get("name") or folder.name), folder, settings, evaluations, passages, rows)


def _differs(one: Run, other: Run) -> str:
    """In what two runs differ besides the seed; empty where in nothing, or where an older run does not tell."""
    for key in ("mode", "own_candidates", "options", "training"):
        if _apart_from_seed(one, key) != _apart_from_seed(other, key):
            return key
    (passages, files), (others, their_files) = map(_judged_on, (one, other))
    if any(passages[key] != others[key] for key in passages.keys() & others.keys()):
        return "the passages that are searched"
    for task in files.keys() & their_files.keys():
        if files[task] != their_files[task]:
            return f"the questions of {task}"
    return ""


def _judged_on(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    passages = {"corpus": run.settings.get("corpus"), "count": run.settings.get("index", {}).get("passages")}
    return {key: value for key, value in passages.items() if value is not None}, run.settings["tasks"]


def _apart_from_seed(run: Run, key: str) -> Any:
    value = run.settings.get(key)
    return {k: v for k, v in value.items() if k not in ("seed", "name")} if isinstance(value, dict) else value


def conditions_of(runs: Sequence[Run]) -> list[Condition]:
    """Groups runs by name, in the order in which the names come first.

    Raises:
        UserError: runs of one name differ in more than the seed, so that their mean would say nothing.
    """
    names = list(dict.fromkeys(run.name for run in runs))
    for name in names:
        alike = [run for run in runs if run.name == name]
        for what in filter(None, (_differs(run, alike[0]) for run in alike)):
            raise UserError(
                f"{', '.join(str(run.folder) for run in alike)} are all named {name!r} and differ in {what}: "
                "evaluate with --name"
            )
    return [Condition(name, tuple(run for run in runs if run.name == name)) for name in names]
