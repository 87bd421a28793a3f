"""Keeps the figures of evaluation runs, without a word of the data, and writes docs/results.md from what is kept.

    python experiments/results.py --keep runs/experiment --as released-10k --hardware "2 cores of ..." --command "..."
    python experiments/results.py [--check]

What is kept lies in `experiments/results/`, a JSON file for each experiment folder: of every run its settings, and of
every data set its figures with their counts and 95 % intervals.
"""

import argparse
import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Plot

from cosup.evaluate import HEADLINES, label_of
from cosup.files import atomic_file

HERE = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
BASELINE = "all-minilm-l6-v2"
DROPPED = ("model", "versions", "tasks", "created", "own_candidates")

Kept = dict[str, Any]
"""One experiment: `hardware`, `command`, `date`, `runs` by name, `baselines` by name and data set, `cells` as text."""


def main() -> None:
    """Keeps an experiment, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="the --out folder of experiments/run.py")
    parser.add_argument("--as", dest="name", help="what it is called")
    parser.add_argument("--hardware", default="", help="what it ran on")
    parser.add_argument("--command", default="", help="what printed it")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    arguments = parser.parse_args()
    if arguments.keep:
        if not arguments.name:
            parser.error("--keep needs --as NAME, which names the file")
        if missing := unfinished(arguments.keep):
            parser.error(f"{missing} is missing; run the experiment again, which goes on, or remove the run")
        keep(arguments.keep, HERE / f"{arguments.name}.json", arguments.hardware, arguments.command)
    text, drawing = page([json.loads(path.read_text("utf-8")) for path in sorted(HERE.glob("*.json"))])
    if not arguments.check:
        PAGE.write_text(text, "utf-8")
        PAGE.with_suffix(".svg").write_text(drawing, "utf-8")
    elif not PAGE.is_file() or PAGE.read_text("utf-8") != text:
        sys.exit(f"{PAGE}: stale; run `python experiments/results.py`")


def unfinished(folder: Path) -> Path | None:
    """A file of figures that an experiment folder still lacks; None where it has all."""
    runs = sorted(folder.glob("evaluations/*/run.json"))
    figures = [run.parent / task / "figures.json" for run in runs for task in json.loads(run.read_text())["tasks"]]
    expected = [*figures, folder / "cells.md"] if runs else [folder / "evaluations" / "*" / "run.json"]
    return next((path for path in expected if not path.is_file()), None)


def keep(folder: Path, path: Path, hardware: str, command: str) -> None:
    """Writes the figures of all evaluation runs of an experiment folder as one file."""
    runs = {run.name: figures_of(run) for run in sorted((folder / "evaluations").iterdir())}
    baselines, cells = folder / "baselines.json", folder / "cells.md"
    kept = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware,
        "command": command,
        "baselines": json.loads(baselines.read_text("utf-8")) if baselines.is_file() else {},
        "cells": cells.read_text("utf-8"),
        "runs": runs,
    }
    with atomic_file(path) as file:
        file.write((json.dumps(kept, indent=1, sort_keys=True) + "\n").encode())


def figures_of(run: Path) -> dict[str, Any]:
    """Settings and figures of an evaluation run; figures that were not measured are left out."""
    settings = json.loads((run / "run.json").read_text("utf-8"))
    tasks = {}
    for name in settings["tasks"]:
        figures = json.loads((run / name / "figures.json").read_text("utf-8"))
        tasks[name] = {key: figure for key, figure in figures.items() if figure["value"] is not None}
    if (run / "training.jsonl").is_file():
        settings["training"] |= spent((run / "training.jsonl").read_text("utf-8"))
    return {key: value for key, value in settings.items() if key not in DROPPED} | {"tasks": tasks}


def spent(log: str) -> dict[str, float]:
    """Steps, minutes and real tokens of a training, by its log."""
    tokens = since = step = 0
    for row in map(json.loads, log.splitlines()):
        if "tokens_per_second" in row:
            tokens += 60 * (row["minutes"] - since) * row["tokens_per_second"]
            step, since = row["step"], row["minutes"]
    return {"steps": step, "minutes": since, "tokens": round(tokens, -3)}


def page(experiments: list[Kept]) -> tuple[str, str]:
    """docs/results.md, and the drawing that it shows."""
    released = [kept for kept in experiments if "released-0" in kept["runs"]]
    parts = ["# Results", "", "Written by `python experiments/results.py` from `experiments/results/`.", ""]
    for kept in experiments:
        if kept.get("cells"):
            parts += [*compared(kept), *conditions(kept), *trained(kept)]
    if released:
        parts += ["![Retrieval of the released model, of BM25 and of all-MiniLM-L6-v2](results.svg)", ""]
    for kept in released:
        parts += [*retrieval(kept), *answers(kept), *ways(kept)]
    return "\n".join(parts).rstrip() + "\n", drawn(released)


def compared(kept: Kept) -> list[str]:
    """The 13 cells of co-supervision against separate training."""
    return [
        "## Co-supervision against separate training",
        "",
        f"{kept['hardware']}, {kept['date']}, `{kept['command']}`. Both see the same examples in the same order; "
        "`separate` trains Gen to write, by `ntp`, and apart from it one other LM, by `nsp`, that encodes questions "
        "and passages. Means over seeds; TriviaQA's gold is silver; some questions of SQuAD and WoW share passages.",
        "",
        *kept["cells"].splitlines(),
        "",
    ]


def conditions(kept: Kept) -> list[str]:
    """What every condition retrieves and answers, with the first seed."""
    runs = {name.removesuffix("-0"): run["tasks"] for name, run in kept["runs"].items() if name.endswith("-0")}
    minilm = kept["baselines"].get(BASELINE, {})
    found = {name: runs[name] for name in runs if kept["runs"][f"{name}-0"]["mode"] == "cosup"}
    lines = ["Success@1 of every condition, forced, first seed:", ""]
    lines += header(["data set", *found, "BM25", "all-MiniLM-L6-v2"])
    for task in by_gold(kept["runs"]["cosup-0"]):
        cells = [value(tasks[task], "forced_success@1") for tasks in found.values()]
        cells += [value(runs["cosup"][task], "bm25_success@1"), value(minilm, task)]
        lines.append(f"| {title(task)} | {' | '.join(cells)} |")
    lines += ["", "Correctness of their answers, first seed:", "", *header(["data set", "", *runs])]
    for task, figures in runs["cosup"].items():
        if name := correctness(task, figures):
            cells = [title(task), label_of(name), *(value(tasks[task], name) for tasks in runs.values())]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def trained(kept: Kept) -> list[str]:
    """What each training took."""
    lines = ["What each training took:", "", *header(["run", "objective", "steps", "real tokens, about", "minutes"])]
    for name, run in kept["runs"].items():
        training = run.get("training") or {}
        if "steps" in training and name == training["name"]:
            figures = f"{training['steps']} | {training['tokens']:,.0f} | {training['minutes']:.1f}"
            lines.append(f"| {name} | {training['objective']} | {figures} |")
    return [*lines, ""]


def header(columns: list[str]) -> list[str]:
    """The head of a table of figures."""
    return [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]


def retrieval(kept: Kept) -> list[str]:
    """The table of what the released model retrieves."""
    run = kept["runs"]["released-0"]
    lines = [
        f"## cosup-smollm2-135m: retrieval among {run['index']['passages']:,} passages",
        "",
        f"{kept['hardware']}, {kept['date']}, `{kept['command']}`. Forced: the state at a `[Ret]` right after the "
        "question. Free: the model's own first retrieval, none of which counts as wrong. In brackets 95 % intervals.",
        "",
        *header(
            [
                "data set",
                "n",
                "success@1, forced",
                "success@5",
                "success@1, free",
                "BM25, success@1",
                "all-MiniLM-L6-v2",
            ]
        ),
    ]
    for task in by_gold(run):
        figures = run["tasks"][task]
        cells = [
            title(task),
            f"{figures['forced_success@1']['count']:,}",
            with_interval(figures["forced_success@1"]),
            value(figures, "forced_success@5"),
            value(figures, "free_success@1"),
            value(figures, "bm25_success@1"),
            value(kept["baselines"].get(BASELINE, {}), task),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def answers(kept: Kept) -> list[str]:
    """The table of what it answers."""
    run = kept["runs"]["released-0"]
    lines = [
        f"Its answers, at most {run['options']['max_new_tokens']} tokens that it chooses itself:",
        "",
        "| data set | n | correct | which is | well formed | cite | median claim, words |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for task, figures in run["tasks"].items():
        name = correctness(task, figures)
        cells = [
            title(task),
            f"{figures['well_formed']['count']:,}",
            with_interval(figures[name]) if name else "",
            label_of(name) if name else "",
            value(figures, "well_formed"),
            value(figures, "cites"),
            f"{figures['claim_words']['value']:.0f}" if "claim_words" in figures else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def ways(kept: Kept) -> list[str]:
    """Correctness with its own retrieval beside BM25's, one retrieval before it writes, and none."""
    names = {"released-0": "where it asks", "released-static-0": "once, with the question"}
    names |= {"released-bm25-0": "once, by BM25", "released-none-0": "never"}
    found = {name: kept["runs"][name]["tasks"] for name in names if name in kept["runs"]}
    if len(found) < 2:
        return []
    lines = ["The same model with other retrieval; the share that is correct:", ""]
    lines += header(["data set", *(names[name] for name in found)])
    for task, figures in found["released-0"].items():
        if (name := correctness(task, figures)) and all(task in tasks for tasks in found.values()):
            lines.append(
                f"| {title(task)} | " + " | ".join(value(tasks[task], name) for tasks in found.values()) + " |"
            )
    return [*lines, ""]


def drawn(released: list[Kept]) -> str:
    """Bars of success@1, for each size of corpus, as SVG."""
    with matplotlib.rc_context({"svg.hashsalt": "cosup", "svg.fonttype": "none", "font.size": 9}):
        plot = Plot(figsize=(8, 2.9 * max(len(released), 1)), layout="constrained")
        for place, kept in enumerate(released, start=1):
            run = kept["runs"]["released-0"]
            tasks = by_gold(run)
            minilm = kept["baselines"].get(BASELINE, {})
            axes = plot.add_subplot(len(released), 1, place)
            bars = {
                "cosup-smollm2-135m": [run["tasks"][task]["forced_success@1"]["value"] for task in tasks],
                "BM25": [run["tasks"][task]["bm25_success@1"]["value"] for task in tasks],
                "all-MiniLM-L6-v2": [minilm.get(task, {}).get("value", float("nan")) for task in tasks],
            }
            for offset, (name, heights) in enumerate(bars.items()):
                colour = ("#3b6fb6", "#9a9a9a", "#d1662f")[offset]
                left = [row + 0.27 * (offset - 1) for row in range(len(tasks))]
                axes.bar(left, heights, width=0.25, label=name, color=colour)
            axes.set_xticks(range(len(tasks)), [title(task) for task in tasks])
            axes.set_ylim(0, 1)
            axes.set_ylabel("success@1")
            axes.set_title(f"{run['index']['passages']:,} passages", loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
        file = io.StringIO()
        plot.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def by_gold(run: dict[str, Any]) -> list[str]:
    """The data sets whose questions have gold passages to find."""
    return [task for task, figures in run["tasks"].items() if "bm25_success@1" in figures and task != "squad-gold"]


def correctness(task: str, figures: dict[str, Any]) -> str:
    """The name of the figure that a data set's answers are judged by; empty where none was measured."""
    known = HEADLINES[task].correctness if task in HEADLINES else ("answer_accuracy",)
    return next((name for name in known if name in figures), "")


def title(task: str) -> str:
    """A data set as people write it."""
    return {"squad-gold": "SQuAD, gold passage given"}.get(task) or getattr(HEADLINES.get(task), "title", task)


def value(figures: dict[str, Any], name: str) -> str:
    """A figure in three digits, or nothing."""
    return f"{figures[name]['value']:.3f}" if name in figures else ""


def with_interval(figure: dict[str, Any]) -> str:
    """A figure with its interval, where it has one."""
    interval = "" if figure["low"] is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"{figure['value']:.3f}{interval}"


if __name__ == "__main__":
    main()
