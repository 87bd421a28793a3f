"""Keeps the figures of evaluation runs, without a word of the data, and writes docs/results.md from what is kept.

    python experiments/results.py --keep runs/experiment --as released-10k --hardware "2 cores of ..." --command "..."
    python experiments/results.py --keep runs/more --as released-10k --add --hardware "..." --command "..."
    python experiments/results.py --keep runs/experiment --losses --as main-h200 --hardware "..." --command "..."
    python experiments/results.py [--check]

What is kept lies in `experiments/results/`, a JSON file for each experiment folder: of every run its settings, and of
every data set its figures with their counts and 95 % intervals. With `--losses`, in `losses/` there, it is what the
trainings of the main comparison logged. With `--add`, the runs of another folder, judged on the same questions and
passages, stand beside those that are kept under that name, and the rows of its sweeps below theirs.
"""

import argparse
import io
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Plot

from cosup.evaluate import HEADLINES, label_of
from cosup.files import atomic_file

HERE = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
BASELINE = "all-minilm-l6-v2"
KEPT = ("*.json", "losses/*.json")
DROPPED = ("model", "versions", "tasks", "created", "own_candidates")

LOSSES = {"ntp": "L_NTP", "nsp": "L_NSP", "accuracy": "in-batch accuracy"}
COMES = "released-as-it-comes-0"
TOLD = {
    COMES: "as it comes, with words beside the state and claims as their passages state them",
    "released-0": "by itself, `--hybrid 0 --no-statements`",
}
COMPARED = ("cosup", "separate")

Kept = dict[str, Any]
"""One experiment: `hardware`, `command`, `date`, `runs` by name, `baselines` by name and data set, `cells` as text."""


def main() -> None:
    """Keeps an experiment, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="the --out folder of experiments/run.py")
    parser.add_argument("--as", dest="name", help="what it is called")
    parser.add_argument("--hardware", default="", help="what it ran on")
    parser.add_argument("--command", default="", help="what printed it")
    parser.add_argument("--losses", action="store_true", help="keep what its trainings logged, not its evaluations")
    parser.add_argument("--add", action="store_true", help="keep its runs beside those that are kept")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    arguments = parser.parse_args()
    if arguments.keep:
        if not arguments.name:
            parser.error("--keep needs --as NAME, which names the file")
        if missing := unlogged(arguments.keep) if arguments.losses else unfinished(arguments.keep):
            parser.error(f"{missing} is missing; run the experiment again, which goes on, or remove the run")
        path = HERE / ("losses" if arguments.losses else "") / f"{arguments.name}.json"
        if arguments.add and (arguments.losses or not path.is_file()):
            parser.error(f"--add needs evaluations that are kept as --as says, and there are none in {path}")
        told = {
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": arguments.hardware,
            "command": arguments.command,
        }
        found = losses_of(arguments.keep) if arguments.losses else evaluations_of(arguments.keep)
        keep(added(told, found, path) if arguments.add else told | found, path)
    experiments, losses = ([json.loads(path.read_text("utf-8")) for path in sorted(HERE.glob(names))] for names in KEPT)
    text = page(experiments, losses)
    if not arguments.check:
        PAGE.write_text(text, "utf-8")
        PAGE.with_suffix(".svg").write_text(drawn([kept for kept in experiments if is_released(kept)]), "utf-8")
        PAGE.with_name("losses.svg").write_text(curves(losses), "utf-8")
    elif not PAGE.is_file() or PAGE.read_text("utf-8") != text:
        sys.exit(f"{PAGE}: stale; run `python experiments/results.py`")


def unfinished(folder: Path) -> Path | None:
    """A file of figures that an experiment folder still lacks; None where it has all."""
    runs = sorted(folder.glob("evaluations/*/run.json"))
    figures = [run.parent / task / "figures.json" for run in runs for task in json.loads(run.read_text())["tasks"]]
    expected = [*figures, folder / "cells.md"] if runs else [folder / "evaluations" / "*" / "run.json"]
    return next((path for path in expected if not path.is_file()), None)


def unlogged(folder: Path) -> Path | None:
    """A file of losses that the folder lacks; None where it has some of both conditions."""
    wanted = [folder / "runs" / f"{condition}-0" / "metrics.jsonl" for condition in COMPARED]
    return next((path for path in wanted if not path.is_file()), None)


def keep(kept: Kept, path: Path) -> None:
    """Writes what is kept of an experiment as one file."""
    with atomic_file(path) as file:
        file.write((json.dumps(kept, indent=1, sort_keys=True) + "\n").encode())


def added(told: Kept, found: Kept, path: Path) -> Kept:
    """What is kept in a file, with runs and sweeps that it lacks, and what is told of all of them."""
    kept: Kept = json.loads(path.read_text("utf-8"))
    known = kept.get("sweeps", "").splitlines()
    rows = [line for line in found["sweeps"].splitlines() if line not in known]
    return kept | told | {"runs": found["runs"] | kept["runs"], "sweeps": "".join(f"{line}\n" for line in known + rows)}


def evaluations_of(folder: Path) -> Kept:
    """The figures of all evaluation runs of an experiment folder."""
    baselines = folder / "baselines.json"
    sweeps = folder / "sweeps.md"
    return {
        "baselines": json.loads(baselines.read_text("utf-8")) if baselines.is_file() else {},
        "cells": (folder / "cells.md").read_text("utf-8"),
        "sweeps": sweeps.read_text("utf-8") if sweeps.is_file() else "",
        "runs": {run.name: figures_of(run) for run in sorted((folder / "evaluations").iterdir())},
    }


def losses_of(folder: Path) -> Kept:
    """What the trainings of the main comparison logged, step by step, as far as all of them got."""
    logs = {path.parent.name: path for path in sorted(folder.glob("runs/*/metrics.jsonl"))}
    runs = {
        name: {row["step"]: [round(row[loss], 4) for loss in LOSSES] for row in log_of(path) if "accuracy" in row}
        for name, path in logs.items()
        if name.rpartition("-")[0] in COMPARED
    }
    steps = sorted(set.intersection(*map(set, runs.values())))
    return {"steps": steps, "runs": {name: [rows[step] for step in steps] for name, rows in runs.items()}}


def log_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def figures_of(run: Path) -> dict[str, Any]:
    """Settings and figures of an evaluation run; figures that were not measured are left out."""
    settings = json.loads((run / "run.json").read_text("utf-8"))
    tasks = {}
    for name in settings["tasks"]:
        figures = json.loads((run / name / "figures.json").read_text("utf-8"))
        tasks[name] = {key: figure for key, figure in figures.items() if figure["value"] is not None}
    if (run / "training.jsonl").is_file():
        settings["training"] |= spent(log_of(run / "training.jsonl"))
    return {key: value for key, value in settings.items() if key not in DROPPED} | {"tasks": tasks}


def spent(log: list[dict[str, Any]]) -> dict[str, float]:
    """Steps, minutes and real tokens of a training, by its log."""
    tokens = since = step = 0
    for row in log:
        if "tokens_per_second" in row:
            tokens += 60 * (row["minutes"] - since) * row["tokens_per_second"]
            step, since = row["step"], row["minutes"]
    return {"steps": step, "minutes": since, "tokens": round(tokens, -3)}


def is_released(kept: Kept) -> bool:
    """Whether an experiment judged the released model."""
    return "released-0" in kept["runs"]


def page(experiments: list[Kept], losses: list[Kept]) -> str:
    """docs/results.md."""
    released = [kept for kept in experiments if is_released(kept)]
    parts = ["# Results", "", "Written by `python experiments/results.py` from `experiments/results/`.", ""]
    for kept in experiments:
        if "cosup-0" in kept["runs"]:
            parts += [*compared(kept), *swept(kept), *conditions(kept), *trained(kept)]
    for kept in losses:
        parts += learnt(kept)
    if losses:
        parts += ["![Losses of both conditions, step by step](losses.svg)", ""]
    if released:
        parts += ["![Retrieval of the released model, of BM25 and of all-MiniLM-L6-v2](results.svg)", ""]
    for kept in released:
        parts += [*retrieval(kept), *answers(kept), *ways(kept)]
    return "\n".join(parts).rstrip() + "\n"


def compared(kept: Kept) -> list[str]:
    """The 13 cells of co-supervision against separate training."""
    if not kept["cells"]:
        return []
    return [
        f"## Co-supervision against separate training, {size(kept)}",
        "",
        f"{kept['hardware']}, {kept['date']}, `{kept['command']}`. Both see the same examples in the same order; "
        "`separate` trains Gen to write, by `ntp`, and apart from it one other LM, by `nsp`, that encodes questions "
        "and passages. Means over seeds; TriviaQA's gold is silver; some questions of SQuAD and WoW share passages.",
        "",
        *kept["cells"].splitlines(),
        "",
    ]


def swept(kept: Kept) -> list[str]:
    """What changes with one setting."""
    if not kept.get("sweeps"):
        return []
    return [
        f"## One setting changed, {size(kept)}",
        "",
        f"{kept['hardware']}, {kept['date']}, `{kept['command']}`. `separate`, and co-supervision with another weight "
        "of the loss of sequences (lambda, 1 in `cosup`), another Emb_seq (in `cosup` a copy of Gen), mined negatives, "
        "or the loss of tokens on passages too; all else as in `cosup`, same examples, same order. Means of seven "
        "cells and of six, first seed; differences with 95 % intervals over questions, each counted once, not seeds.",
        "",
        *kept["sweeps"].splitlines(),
        "",
    ]


def size(kept: Kept) -> str:
    """How long each training of a comparison was, and how large the corpus that was searched."""
    run = kept["runs"]["cosup-0"]
    steps, tokens = (run["training"][name] for name in ("steps", "tokens"))
    return f"{steps} steps of about {tokens / steps:,.0f} tokens, {run['index']['passages']:,} passages searched"


def conditions(kept: Kept) -> list[str]:
    """What every condition retrieves and answers, with the first seed."""
    runs = {name.removesuffix("-0"): run["tasks"] for name, run in kept["runs"].items() if name.endswith("-0")}
    cosup = runs["cosup"]
    searched = by_gold(kept["runs"]["cosup-0"])
    lines = ["Success@1 of every condition, forced, first seed:", "", *header(["", *map(title, searched)])]
    rows = {name: runs[name] for name in runs if kept["runs"][f"{name}-0"]["mode"] == "cosup"}
    for name, tasks in rows.items():
        lines.append(row(name, *(value(tasks.get(task, {}), "forced_success@1") for task in searched)))
    lines.append(row("BM25", *(value(cosup[task], "bm25_success@1") for task in searched)))
    lines.append(row("all-MiniLM-L6-v2", *(value(kept["baselines"].get(BASELINE, {}), task) for task in searched)))
    figures = {task: name for task, found in cosup.items() if (name := correctness(task, found))}
    lines += ["", f"Their answers, first seed; {measures(figures)}:", "", *header(["", *map(title, figures)])]
    for name, tasks in runs.items():
        lines.append(row(name, *(value(tasks.get(task, {}), figure) for task, figure in figures.items())))
    return [*lines, ""]


def measures(figures: dict[str, str]) -> str:
    """Which data sets are judged by which figure, in words."""
    by_figure = {name: [title(task) for task in figures if figures[task] == name] for name in figures.values()}
    return "; ".join(f"{', '.join(tasks)}: {label_of(name)}" for name, tasks in by_figure.items())


def trained(kept: Kept) -> list[str]:
    """What each training took."""
    lines = ["What each training took:", "", *header(["run", "objective", "steps", "real tokens, about", "minutes"])]
    for name, run in kept["runs"].items():
        training = run.get("training") or {}
        if "steps" in training and name == training["name"]:
            figures = f"{training['steps']} | {training['tokens']:,.0f} | {training['minutes']:.1f}"
            lines.append(f"| {name} | {training['objective']} | {figures} |")
    return [*lines, ""]


def learnt(kept: Kept) -> list[str]:
    """Losses of both conditions in four parts of the training, means over seeds."""
    steps, values_RTL = kept["steps"], {name: np.array(rows) for name, rows in kept["runs"].items()}
    seeds = sum(name.startswith(COMPARED[0]) for name in values_RTL)
    lines = [
        f"## Losses of longer training, {seeds} seeds",
        "",
        f"{kept['hardware']}, {kept['date']}, `{kept['command']}`. Each batch is of examples that were not seen "
        f"before, so these are losses of unseen text; up to step {steps[-1]}, which all runs reached.",
        "",
        *header(["up to step", *(f"{title}, {name}" for title in LOSSES.values() for name in COMPARED)]),
    ]
    for part in np.array_split(np.arange(len(steps)), 4):
        means = [
            np.mean([rows_TL[part, loss] for name, rows_TL in values_RTL.items() if name.startswith(condition)])
            for loss in range(len(LOSSES))
            for condition in COMPARED
        ]
        lines.append(f"| {steps[part[-1]]} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return [*lines, ""]


def curves(losses: list[Kept]) -> str:
    """Both losses of every run, step by step, as SVG."""
    with matplotlib.rc_context({"svg.hashsalt": "cosup", "svg.fonttype": "none", "font.size": 9}):
        plot = Plot(figsize=(8, 2.9 * max(len(losses), 1)), layout="constrained")
        panels = plot.subplots(max(len(losses), 1), 2, squeeze=False)
        for kept, row in zip(losses, panels, strict=False):
            for loss, axes in enumerate(row):
                for name, values in kept["runs"].items():
                    condition, _, seed = name.rpartition("-")
                    colour = ("#3b6fb6", "#d1662f")[COMPARED.index(condition)]
                    label = condition if seed == "0" else None
                    axes.plot(kept["steps"], [each[loss] for each in values], color=colour, linewidth=1, label=label)
                axes.set(yscale="log", xlabel="step", title=list(LOSSES.values())[loss])
                axes.set_yticks(ticks := (0.3, 0.5, 1, 2, 4), [f"{tick:g}" for tick in ticks])
                axes.minorticks_off()
                axes.spines[["top", "right"]].set_visible(False)
            row[0].legend(frameon=False)
        return as_svg(plot)


def row(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def header(columns: list[str]) -> list[str]:
    """The head of a table of figures."""
    return [row(*columns), "|---|" + "--:|" * (len(columns) - 1)]


def retrieval(kept: Kept) -> list[str]:
    """The table of what the released model retrieves."""
    run = kept["runs"]["released-0"]
    comes = kept["runs"].get(COMES, {}).get("tasks", {})
    lines = [
        f"## cosup-smollm2-135m: retrieval among {run['index']['passages']:,} passages",
        "",
        f"{kept['hardware']}, {kept['date']}, `{kept['command']}`. Forced: the state at a `[Ret]` right after the "
        "question. Free: the model's own first retrieval, none of which counts as wrong. In brackets 95 % intervals."
        + (" As it comes: with words beside the state (`--hybrid 0.2`), forced." if comes else ""),
        "",
        *header(
            [
                "data set",
                "n",
                "success@1, forced",
                "success@5",
                "success@1, free",
                *(["as it comes"] if comes else []),
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
            *([value(comes.get(task, {}), "forced_success@1")] if comes else []),
            value(figures, "bm25_success@1"),
            value(kept["baselines"].get(BASELINE, {}), task),
        ]
        lines.append(row(*cells))
    return [*lines, ""]


def answers(kept: Kept) -> list[str]:
    """The tables of what it answers."""
    found = [(kept["runs"][name], told) for name, told in TOLD.items() if name in kept["runs"]]
    return [line for run, told in found for line in answers_of(run, told)]


def answers_of(run: Kept, told: str) -> list[str]:
    """The table of what it answers in one way."""
    lines = [
        f"Its answers {told}, at most {run['options']['max_new_tokens']} tokens that it chooses itself:",
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
        lines.append(row(*cells))
    return [*lines, ""]


def ways(kept: Kept) -> list[str]:
    """Correctness with its own retrieval beside BM25's, one retrieval before it writes, and none; of other claims."""
    names = {"released-0": "where it asks", "released-static-0": "once, with the question"}
    names |= {"released-bm25-0": "once, by BM25", "released-none-0": "never"}
    names |= {"released-hybrid-0": "where it asks, `--hybrid 0.2`", COMES: "as it comes: that and `--statements`"}
    found = {name: kept["runs"][name]["tasks"] for name in names if name in kept["runs"]}
    if len(found) < 2:
        return []
    lines = ["The same model with other retrieval, or with statements for claims; the share that is correct:", ""]
    lines += header(["data set", *(names[name] for name in found)])
    for task, figures in found["released-0"].items():
        if name := correctness(task, figures):
            lines.append(row(title(task), *(value(tasks.get(task, {}), name) for tasks in found.values())))
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
            comes = kept["runs"].get(COMES, {}).get("tasks", {})
            bars = {
                "cosup-smollm2-135m": successes(comes, tasks),
                "the same, state alone": successes(run["tasks"], tasks),
                "BM25": successes(run["tasks"], tasks, "bm25_success@1"),
                "all-MiniLM-L6-v2": [minilm.get(task, {}).get("value", np.nan) for task in tasks],
            }
            for offset, (name, heights) in enumerate(bars.items()):
                colour = ("#1d3557", "#3b6fb6", "#9a9a9a", "#d1662f")[offset]
                left = [row + 0.21 * (offset - 1.5) for row in range(len(tasks))]
                axes.bar(left, heights, width=0.19, label=name, color=colour)
            axes.set_xticks(range(len(tasks)), [title(task) for task in tasks])
            axes.set_ylim(0, 1)
            axes.set_ylabel("success@1")
            axes.set_title(f"{run['index']['passages']:,} passages", loc="left")
            axes.spines[["top", "right"]].set_visible(False)
        if released:
            plot.legend(*axes.get_legend_handles_labels(), frameon=False, ncols=4, loc="outside upper right")
        return as_svg(plot)


def successes(figures: dict[str, Any], tasks: list[str], name: str = "forced_success@1") -> list[float]:
    """A figure of data sets, not a number where it was not measured."""
    return [figures.get(task, {}).get(name, {}).get("value", np.nan) for task in tasks]


def as_svg(plot: Plot) -> str:
    """A drawing as text."""
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
