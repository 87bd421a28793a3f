"""The paper's Figures 3, 4 and 5 and the learning curves, drawn from evaluation runs as SVG."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Plot

from cosup.evaluate import HEADLINES, label_of
from cosup.report.load import Condition
from cosup.report.tables import headline

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cosup",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
}
_COLOURS = (
    "#3b6fb6", "#d1662f", "#3f8f5b", "#8a5fb0", "#b0473f", "#6b6b6b", "#c2a02c", "#2a9d9d", "#d070a8", "#5c4a32",
)  # fmt: skip
"""As many as the paper has data sets."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing, or why there is none.

    Args:
        title: its heading.
        caption: what is seen.
        svg: empty where the runs don't allow it.
    """

    title: str
    caption: str
    svg: str


def pictures(conditions: Sequence[Condition], tasks: Sequence[str]) -> list[Picture]:
    """All four, in the paper's order."""
    return [
        _reduction(conditions, tasks),
        _against(conditions, tasks, "Size of Emb_seq (Figure 4)", "parameters of Emb_seq, millions", emb_millions),
        _against(conditions, tasks, "Weight of the sequence loss (Figure 5)", "lambda", lambda_of),
        _curves(conditions),
    ]


_NO_SHORT_ANSWERS = "No data set of these runs has short answers that could stand in a passage."


def _reduction(conditions: Sequence[Condition], tasks: Sequence[str]) -> Picture:
    title = "Reliance on parametric knowledge (Figure 3)"
    shown = [task for task in tasks if any(_value(c, task, "reduction_rate") is not None for c in conditions)]
    if not shown:
        asked = any(condition.figure(task, "reduction_rate") for condition in conditions for task in tasks)
        why = "No run answered a question rightly, so there is nothing to lose." if asked else _NO_SHORT_ANSWERS
        return Picture(title, why, "")
    plot, axes = _canvas(max(8.4, 1.2 + 0.5 * len(shown) * (len(conditions) + 1)))
    width = 0.8 / len(conditions)
    for number, condition in enumerate(conditions):
        for place, task in enumerate(shown):
            figure = condition.figure(task, "reduction_rate")
            if figure is None or figure.value is None:
                continue
            x = place + (number - (len(conditions) - 1) / 2) * width
            label = condition.name if place == 0 else None
            axes.bar(x, figure.value, width * 0.9, color=_COLOURS[number % len(_COLOURS)], label=label)
            top = max(figure.value, figure.high or 0.0)
            axes.text(x, top + 0.02, f"{figure.value:.2f}", ha="center", fontsize=8)
            if figure.low is not None and figure.high is not None:
                axes.plot([x, x], [figure.low, figure.high], color="#222", linewidth=1)
    axes.set_xticks(range(len(shown)), [_title(task) for task in shown])
    axes.set_ylabel("reduction rate")
    axes.set_ylim(0, 1.1)
    _legend(axes, len(conditions))
    caption = (
        "How much of the answer presence is lost when answers that stand in no passage that was read count as wrong; "
        "lines are 95 % intervals. Lower is better grounded."
    )
    return Picture(title, caption, _svg(plot))


def _against(
    conditions: Sequence[Condition],
    tasks: Sequence[str],
    title: str,
    axis: str,
    x_of: Callable[[Condition], float | None],
) -> Picture:
    placed = [condition for condition in conditions if x_of(condition) is not None]
    if len({x_of(condition) for condition in placed}) < 2:
        return Picture(title, f"It takes runs that differ in it; these don't ({axis}).", "")
    plot, both = _canvas(7.4, columns=2)
    for axes, what in zip(both, ("retrieval", "correctness"), strict=True):
        names = {task: getattr(headline(task, conditions), what) for task in tasks}
        for number, (task, name) in enumerate(names.items()):
            points = points_of(placed, task, name, x_of)
            label = _title(task) if axes is both[0] else None
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=label)
        axes.set_xlabel(axis)
        axes.set_title(what)
        axes.set_ylabel(
            label_of(names[tasks[0]]) if len(set(names.values())) == 1 else "each data set's headline figure"
        )
        axes.set_ylim(0, 1)
        if axis == "lambda" and min(x_of(condition) or 0.0 for condition in placed) > 0:
            axes.set_xscale("log")
    plot.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return Picture(title, f"Each point is a condition; {len(placed)} are drawn.", _svg(plot))


def points_of(
    conditions: Sequence[Condition], task: str, name: str, x_of: Callable[[Condition], float | None]
) -> list[tuple[float, float]]:
    """Where each condition stands and what it reached, from left to right; those that lack either are left out."""
    found = [(x_of(condition), _value(condition, task, name)) for condition in conditions]
    return sorted((x, y) for x, y in found if x is not None and y is not None)


def _curves(conditions: Sequence[Condition]) -> Picture:
    title = "Learning curves"
    drawn = _trainings(conditions)
    if not drawn:
        return Picture(title, "The models' run folders hold no metrics of their training.", "")
    plot, three = _canvas(10.5, columns=3)
    for axes, key in zip(three, ("ntp", "nsp", "accuracy"), strict=True):
        for number, (name, trainings) in enumerate(drawn.items()):
            for seed, rows in enumerate(trainings):
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None and "step" in row]
                colour, label = _COLOURS[number % len(_COLOURS)], name if seed == 0 else None
                axes.plot([x for x, _ in points], [y for _, y in points], color=colour, linewidth=1.2, label=label)
        axes.set_xlabel("step")
        axes.set_title({"ntp": "ntp loss", "nsp": "nsp loss", "accuracy": "accuracy among candidates"}[key])
        axes.set_ylim(bottom=0)
    _legend(three[0], len(drawn))
    return Picture(
        title, "Of the models' training, by optimisation step; seeds of one condition in one colour.", _svg(plot)
    )


def _trainings(conditions: Sequence[Condition]) -> dict[str, list[list[dict[str, Any]]]]:
    """The metrics of each condition's trainings; a model that was evaluated in several modes counts once."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    seen: set[str] = set()
    for condition in conditions:
        for run in condition.runs:
            if run.curves and str(run.curves) not in seen:
                seen.add(str(run.curves))
                found.setdefault(condition.name, []).append(run.curves)
    return found


def _value(condition: Condition, task: str, name: str) -> float | None:
    figure = condition.figure(task, name)
    return None if figure is None else figure.value


def emb_millions(condition: Condition) -> float | None:
    """The size of Emb_seq, which matters to those runs alone that retrieve by it."""
    if condition.runs[0].settings["mode"] in ("none", "bm25"):
        return None
    count = condition.runs[0].settings.get("emb_parameters")
    return None if count is None else count / 1e6


def lambda_of(condition: Condition) -> float | None:
    """The weight that the model was trained with; None for objectives that have only one of the losses."""
    training = condition.runs[0].training
    return training.get("lambda") if training.get("objective") == "ntp+nsp" else None


def _title(task: str) -> str:
    return HEADLINES[task].title if task in HEADLINES else task


def _canvas(width: float, columns: int = 1) -> tuple[Plot, Any]:
    with matplotlib.rc_context(_STYLE):
        plot = Plot(figsize=(width, 3.2), layout="constrained")
        axes = plot.subplots(1, columns)
    for each in axes if columns > 1 else [axes]:
        each.grid(axis="y", color="#ddd", linewidth=0.6)
    return plot, axes


def _legend(axes: Any, count: int) -> None:
    if count > 1:
        axes.legend(frameon=False, fontsize=8)


def _svg(plot: Plot) -> str:
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        plot.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
