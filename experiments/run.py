"""Does co-supervision hold on a small model? Every condition trained, indexed, evaluated and compared.

    python experiments/run.py --data FOLDER [--out runs/experiment] [--only cosup separate] [--seeds 0 1 2]
                              [--questions 200] [--passages 10000] [--set train.max_steps=50] [--workers 4]

FOLDER holds `train/`, `dev/` and `corpus.jsonl.gz` in the form of the README's "Formats". Conditions differ from
`recipes/experiment.yaml` in what `CONDITIONS` says, and in nothing else: same examples, same order, same steps. Those
of the main comparison are trained with every seed, the others with the first. All are judged on the same questions of
each data set, over one corpus that holds the gold passages and others drawn at random; the sweeps, and seeds after the
first, only on the data sets of the 13 cells. `squad-gold` are SQuAD's questions with nothing but their gold passage to
retrieve. `released` is the model that comes with cosup: by itself, as all others are judged, and as it comes, with
what its `cosup.json` says of words and statements.

What is finished is skipped, and what was interrupted goes on: stop it at any time, and run it again. A GPU has room for
several conditions at once: `--workers`. `--out` then holds `data/`, `runs/`, `indexes/`, `evaluations/`, `report/` as
`cosup report` writes it, `baselines.json`: success@1 of all-MiniLM-L6-v2 on the same corpus, `cells.md`: co-supervision
against separate training in 13 cells, and `sweeps.md`: every other way to train against co-supervision, first seed.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from cosup import metrics, terminal
from cosup.config import RELEASED, Recipe, UserError, load_recipe
from cosup.data import Question, read_passages, read_questions, write_records
from cosup.data.convert import convert
from cosup.data.worldfacts import build_worldfacts
from cosup.embedder import ContextQueries
from cosup.engine import Options
from cosup.evaluate import HEADLINES, Mode, RunSettings, evaluate_tasks, label_of, read_tasks
from cosup.files import atomic_file
from cosup.index import build_index, mine, open_index
from cosup.metrics.statistics import Values
from cosup.model import CoSupModel
from cosup.model.lms import ALL_MINILM, place_of
from cosup.report import Condition, conditions_of, read_run, write_report
from cosup.train import train_recipe

BASE = Path(__file__).parents[1] / "recipes" / "experiment.yaml"
CONDITIONS: dict[str, tuple[str, ...]] = {
    "cosup": (),
    "untrained": (),
    "separate": ("train.objective=separate",),
    "lambda-0.03": ("train.lambda=0.03",),
    "lambda-0.2": ("train.lambda=0.2",),
    "lambda-5": ("train.lambda=5",),
    "lambda-30": ("train.lambda=30",),
    "emb-12-layers": ("model.emb_layers=12",),
    "emb-6-layers": ("model.emb_layers=6",),
    "emb-shared": ("model.emb=gen",),
    "emb-minilm": ("model.emb=all-minilm-l6-v2",),
    "hard-negatives": ("train.negatives=4",),
    "on-passages": ("train.train_on_passages=true",),
    "released": (),
}
MAIN = ("cosup", "separate")
AS_THEY_ARE = ("untrained", "released")
ON_ALL_SETS = (*MAIN, *AS_THEY_ARE)  # with their first seed
MINING = "hard-negatives"  # mines with the model of `cosup`
ROWS = 64 if torch.cuda.is_available() else 16  # questions that are answered at once
ALONE = Options(max_new_tokens=64, quote=False, statements=False, hybrid=0.0)  # what a model does by itself
Way = Mode | Literal["as-it-comes"]
MODES: dict[str, tuple[Way, ...]] = {
    "cosup": ("cosup", "static", "none"),
    "separate": ("cosup", "bm25"),
    "released": ("cosup", "as-it-comes", "static", "none", "bm25"),
}
"""How a condition is judged, where not by its own retrieval alone; modes after the first with the first seed only.

The Gen of `separate` is the one that `ntp` alone would train, so `separate` with BM25 is `ntp` with BM25.
"""

Job = tuple[str, int, Way]
"""Condition, seed, and in what mode, or that it is as the model comes."""

RETRIEVAL = ("squad", "nq", "fever", "hotpotqa", "asqa", "triviaqa", "wow")
CORRECTNESS = RETRIEVAL[:-1]
PARTS = ("retrieval", "answers", "both")


def main() -> None:
    """Everything that is left to do."""
    arguments = parse()
    if load_recipe(BASE, arguments.set).train.negatives:
        raise UserError("train.negatives is what the condition hard-negatives differs in: name that with --only")
    drawn = {"questions": arguments.questions, "passages": arguments.passages}
    refuse_another(arguments.out, drawn | {"set": arguments.set})
    data = Data(arguments.data, arguments.out / "data", **drawn)
    data.make(arguments.set)
    for wave in waves(jobs(arguments.only, arguments.seeds), arguments.workers):
        work(wave, data, arguments)
    baselines(data, arguments.out / "baselines.json")
    folders = finished(arguments.out / "evaluations")  # of earlier calls too
    write_report(folders, arguments.out / "report")
    conditions = conditions_of([read_run(folder) for folder in folders])
    for name, table in {"cells": cells(conditions), "sweeps": sweeps(conditions)}.items():
        with atomic_file(arguments.out / f"{name}.md") as file:
            file.write(table.encode())
        print(table)


def finished(evaluations: Path) -> list[Path]:
    """The folders of evaluations that have every data set that they were begun with."""
    runs = {path.parent: json.loads(path.read_text("utf-8")) for path in sorted(evaluations.glob("*/run.json"))}
    return [run for run, told in runs.items() if all((run / task / "figures.json").is_file() for task in told["tasks"])]


def jobs(conditions: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every evaluation, in order: the main comparison, seed by seed, then all else."""
    modes = {condition: MODES.get(condition, ("cosup",)) for condition in conditions}
    compared = [condition for condition in conditions if condition in MAIN]
    first = [(condition, seed, modes[condition][0]) for seed in seeds for condition in compared]
    every = [(condition, seeds[0], mode) for condition in conditions for mode in modes[condition]]
    return list(dict.fromkeys([*first, *every]))


def waves(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """Jobs that can be done at the same time: those of the second wave need a model that the first one trains."""
    if workers == 1:
        return [list(jobs)]
    first: dict[tuple[str, int], Job] = {}
    for job in jobs:
        if job[0] != MINING:
            first.setdefault(job[:2], job)
    return [list(first.values()), [job for job in jobs if job not in first.values()]]


def work(wave: Sequence[Job], data: "Data", arguments: argparse.Namespace) -> None:
    """Does jobs, several at once where that is asked; the first one that fails ends all."""
    if arguments.workers == 1 or len(wave) < 2:
        for job in wave:
            judged(*job, data, arguments)
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.workers)))
    spawn = multiprocessing.get_context("spawn")  # a process for each run gives its memory back
    with ProcessPoolExecutor(arguments.workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        running = [pool.submit(judged, *job, data, arguments) for job in wave]
        try:
            for finished_one in as_completed(running):
                finished_one.result()
        finally:
            pool.shutdown(cancel_futures=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of questions and passages")
    parser.add_argument("--out", type=Path, default=Path("runs/experiment"), help="where everything is kept")
    parser.add_argument("--only", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help="conditions")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=200, help="of each data set")
    parser.add_argument("--passages", type=int, default=10_000, help="of the corpus that is searched")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--set", action="append", default=[], help="a setting of all recipes, as for cosup train")
    return parser.parse_args()


def refuse_another(out: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings of an experiment; raises UserError if those of the one in its folder are others."""
    path = out / "settings.json"
    if not path.is_file():
        with atomic_file(path) as file:
            file.write((json.dumps(settings, indent=1) + "\n").encode())
    if (kept := json.loads(path.read_text("utf-8"))) != settings:
        raise UserError(f"{out} holds an experiment with {kept}, not {settings}; name another folder with --out")


class Data:
    """What is learnt from and judged on.

    Args:
        source: see the top of this file.
        folder: where the questions and the corpus of the judgement are written.
        questions: of each data set.
        passages: of the corpus, those that the questions need included.
    """

    def __init__(self, source: Path, folder: Path, *, questions: int, passages: int):
        self.source, self.folder, self._questions, self._passages = source, folder, questions, passages
        self.facts = folder / "worldfacts"

    def recipe(self, condition: str, seed: int, settings: Sequence[str]) -> Recipe:
        """The whole recipe of a condition."""
        recipe = load_recipe(BASE, [*CONDITIONS[condition], *settings, f"seed={seed}", f"name={condition}-{seed}"])
        section = recipe.data.model_copy(
            update={
                "folder": self.source.resolve(),
                "train": (*recipe.data.train, (self.facts / "train.jsonl").resolve()),
                "passages": (*recipe.data.passages, (self.facts / "passages.jsonl").resolve()),
            }
        )
        return recipe.model_copy(update={"data": section})

    @property
    def corpus(self) -> Path:
        """The passages that are searched."""
        return self.folder / "passages.jsonl"

    @property
    def tasks(self) -> list[Path]:
        """The files of questions to judge by."""
        return sorted((self.folder / "dev").glob("*.jsonl"))

    def make(self, settings: Sequence[str] = ()) -> None:
        """Draws questions and corpus, unless they are there. Raises UserError if training would show an answer."""
        if self.corpus.is_file():
            return
        build_worldfacts(self.facts)
        drawn = {
            path.name.split(".")[0]: random.Random(0).sample(found, min(self._questions, len(found)))
            for path in [*sorted((self.source / "dev").glob("*.jsonl*")), self.facts / "test.jsonl"]
            for found in [list(read_questions(path))]
        }
        drawn["worldfacts"] = drawn.pop("test")
        drawn["squad-gold"] = [replace(question, candidates=question.gold) for question in drawn.get("squad", ())]
        learnt = self.recipe("cosup", 0, settings).data.train
        refuse_leaks(
            read_questions(*(self.source / path for path in learnt)), [q for some in drawn.values() for q in some]
        )
        for name, questions in drawn.items():
            write_records(self.folder / "dev" / f"{name}.jsonl", questions)
        needed = {id for questions in drawn.values() for question in questions for id in question.gold}
        everything = [*read_passages(self.source / "corpus.jsonl.gz"), *read_passages(self.facts / "passages.jsonl")]
        others = [p.id for p in everything if p.id not in needed]
        kept = needed | set(random.Random(0).sample(others, min(max(self._passages - len(needed), 0), len(others))))
        write_records(self.corpus, (p for p in everything if p.id in kept))


def refuse_leaks(learnt: Iterable[Question], judged: Sequence[Question]) -> None:
    """Raises UserError if a question, or a gold passage of one, is in training; worldfacts share facts by design."""
    asked = {question.question.casefold() for question in judged}
    gold = {id for question in judged if not question.task.startswith("worldfacts") for id in question.gold}
    for question in learnt:
        if question.question.casefold() in asked or gold.intersection(question.gold):
            raise UserError(f"the training question {question.id!r} or its passage is in the evaluation; remove it")


def judged(condition: str, seed: int, way: Way, data: Data, arguments: argparse.Namespace) -> None:
    """Trains, indexes and evaluates a condition, where that is not done yet."""
    terminal.step(f"{condition}, seed {seed}, {way}")
    run = trained(condition, seed, data, arguments)
    model = CoSupModel.load(run)
    index = indexed(model, data.corpus, arguments.out / "indexes" / f"{condition}-{seed}")
    name = condition if way == MODES.get(condition, ("cosup",))[0] else f"{condition}-{way}"
    folder: Path = arguments.out / "evaluations" / f"{name}-{seed}"
    on_all = condition in ON_ALL_SETS and seed == arguments.seeds[0]
    asked = [path for path in data.tasks if on_all or path.stem in RETRIEVAL]
    evaluate_tasks(
        model,
        index,
        read_tasks([str(path) for path in asked]),
        folder,
        settings=settings_of(way, name),
        source=run,
        counter=lambda what, total, unit: terminal.counting(what, total, unit=unit),
    )


def settings_of(way: Way, name: str) -> RunSettings:
    """How a condition is asked."""
    if way == "as-it-comes":
        return RunSettings(options=Options(max_new_tokens=ALONE.max_new_tokens, rows=ROWS), name=name)
    return RunSettings(way, options=replace(ALONE, rows=ROWS), name=name)


def trained(condition: str, seed: int, data: Data, arguments: argparse.Namespace) -> Path:
    """The run folder of a condition."""
    recipe = data.recipe(condition, seed, arguments.set)
    run: Path = arguments.out / "runs" / f"{condition}-{seed}"
    if condition == "released":
        return Path(RELEASED)
    if condition == "untrained":
        if not (run / "cosup.json").is_file():
            CoSupModel.start(recipe.model, seed=seed).save(run)
        return run
    if recipe.train.negatives:
        mined = with_negatives(recipe, data, arguments)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": (mined.resolve(),)})})
    with terminal.training_bar() as bar:
        return train_recipe(recipe, run, callbacks=[bar], on_start=terminal.show_settings)


def indexed(model: CoSupModel, passages: Path, folder: Path):  # type: ignore[no-untyped-def]
    """The index of a model over passages, built where it is not there yet."""
    if not (folder / "index.json").is_file():
        found = list(read_passages(passages))
        with terminal.counting("indexing", len(found), unit="passages") as on_progress:
            build_index(found, model, folder, on_progress=on_progress)
    return open_index(folder)


def with_negatives(recipe: Recipe, data: Data, arguments: argparse.Namespace) -> Path:
    """The training examples with negatives mined by the co-supervised model among the passages that they cite."""
    path = data.folder / "mined.jsonl"
    if path.is_file():
        return path
    model = CoSupModel.load(trained("cosup", recipe.seed, data, arguments))
    known = {p.id: p for p in read_passages(*map(recipe.data.resolve, recipe.data.passages))}
    asked = read_questions(*map(recipe.data.resolve, recipe.data.train))
    examples = list(convert(asked, passages=known))
    cited = {part.passage for example in examples for part in example.evidence}
    write_records(data.folder / "cited.jsonl", (known[id] for id in sorted(cited)))
    index = indexed(model, data.folder / "cited.jsonl", arguments.out / "indexes" / "mining")
    write_records(path, mine(examples, index, ContextQueries(model, index)))
    return path


class Cell(NamedTuple):
    """One figure of one data set, of two conditions: float64 [S, Q] each, for the same seeds and questions."""

    kind: str
    task: str
    figure: str
    ids: list[str]
    first_SQ: Values
    second_SQ: Values

    def means(self) -> tuple[float, float]:
        """Over seeds and questions."""
        return float(self.first_SQ.mean()), float(self.second_SQ.mean())


def cells(conditions: Sequence[Condition]) -> str:
    """Co-supervision against separate training in 13 cells, as Markdown; empty where one of them is missing."""
    by_name = {condition.name: condition for condition in conditions}
    if not set(MAIN) <= set(by_name):
        return ""
    found = compared(*(by_name[name] for name in MAIN))
    lines = ["| cell | n | cosup | separate | difference |", "|---|--:|--:|--:|--:|"]
    for cell in found:
        ours, theirs = cell.means()
        name = f"{HEADLINES[cell.task].title}, {label_of(cell.figure)}"
        lines.append(f"| {name} | {len(cell.ids)} | {ours:.3f} | {theirs:.3f} | {ours - theirs:+.3f} |")
    held = sum(ours >= theirs for ours, theirs in (cell.means() for cell in found))
    lines += [
        "",
        f"Co-supervision is at least as good in {held} of 13 cells. The mean difference, each question counted once:",
    ]
    lines += ["", *(f"- {told(part, difference(found, part))}" for part in PARTS)]
    return "\n".join(lines) + "\n"


def sweeps(conditions: Sequence[Condition]) -> str:
    """Each other way to train against co-supervision, first seed, as Markdown; empty where there is none."""
    by_name = {condition.name: replace(condition, runs=condition.runs[:1]) for condition in conditions}
    swept = [name for name in CONDITIONS if name in by_name and name not in ("cosup", *AS_THEY_ARE)]
    if "cosup" not in by_name or set(swept) <= set(MAIN):
        return ""
    lines = ["| condition | retrieval | less that of cosup | answers | less those of cosup |", "|---|--:|--:|--:|--:|"]
    for name in ("cosup", *swept):
        found = compared(by_name[name], by_name["cosup"])
        row = [name]
        for part in PARTS[:-1]:
            mean = np.mean([cell.means()[0] for cell in found if cell.kind == part])
            row += [f"{mean:.3f}", "" if name == "cosup" else with_interval(difference(found, part))]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def compared(first: Condition, second: Condition) -> list[Cell]:
    """The 13 cells of two conditions, by the seeds that both have. Raises UserError if there is none."""
    first, second = with_seeds_of(second, first), with_seeds_of(first, second)
    if not first.runs:
        raise UserError(f"{first.name!r} and {second.name!r} have no seed in common; judge both with the same --seeds")
    found = [("retrieval", task, "forced_success@1") for task in RETRIEVAL]
    found += [("answers", task, correctness(task, first)) for task in CORRECTNESS]
    cells = []
    for kind, task, figure in found:
        theirs = set(second.ids(task, figure))
        ids = [id for id in first.ids(task, figure) if id in theirs]
        cells.append(
            Cell(kind, task, figure, ids, *(condition.scores(task, figure, ids) for condition in (first, second)))
        )
    return cells


def with_seeds_of(other: Condition, condition: Condition) -> Condition:
    """A condition with the runs of those seeds that the other has too, in the order of the seeds."""
    by_seed, shared = ({run.settings["training"]["seed"]: run for run in c.runs} for c in (condition, other))
    return replace(condition, runs=tuple(by_seed[seed] for seed in sorted(by_seed) if seed in shared))


def difference(cells: Sequence[Cell], part: str) -> metrics.Difference:
    """The mean difference in the cells of one kind, or in both, with an interval over questions and seeds."""
    found: dict[tuple[str, str], list[Values]] = {}
    for cell in (cell for cell in cells if part in (cell.kind, "both")):
        for id, difference_S in zip(cell.ids, (cell.first_SQ - cell.second_SQ).T, strict=True):
            found.setdefault((cell.task, id), []).append(difference_S)
    mean_SQ = np.stack([np.mean(of_one, axis=0) for of_one in found.values()], axis=1)
    return metrics.paired_difference(np.zeros_like(mean_SQ[:1]), mean_SQ)  # a draw of seeds takes both conditions'


def with_interval(found: metrics.Difference) -> str:
    """A difference in a cell of a table."""
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def told(part: str, found: metrics.Difference) -> str:
    """A difference in a sentence."""
    seeds = f"{found.seeds[1]} seeds" if found.seeds[1] > 1 else "1 seed"
    return (
        f"{part}: {found.value:+.4f}, 95 % interval over questions and seeds [{found.low:+.4f}, {found.high:+.4f}], "
        f"p {found.p:.4f} for these seeds ({found.questions:,} questions, {seeds})"
    )


def baselines(data: Data, path: Path) -> None:
    """Writes success@1 of all-MiniLM-L6-v2 on the same questions and corpus, unless it is there."""
    if path.is_file():
        return
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(place_of(ALL_MINILM, "emb")), device="cpu")
    passages = list(read_passages(data.corpus))
    vectors_ND = encoder.encode([f"{p.title} {p.text}".strip() for p in passages], normalize_embeddings=True)
    found = {}
    for task in RETRIEVAL:
        asked = [question for question in read_questions(data.folder / "dev" / f"{task}.jsonl") if question.gold]
        queries_QD = encoder.encode([question.question for question in asked], normalize_embeddings=True)
        first_Q = np.argmax(queries_QD @ vectors_ND.T, axis=1)
        hits = [passages[place].id in question.gold for place, question in zip(first_Q, asked, strict=True)]
        found[task] = {"value": float(np.mean(hits)), "count": len(asked)}
    with atomic_file(path) as file:
        file.write((json.dumps({ALL_MINILM: found}, indent=1) + "\n").encode())


def correctness(task: str, condition: Condition) -> str:
    """The figure that a data set's answers are judged by."""
    return next(name for name in HEADLINES[task].correctness if condition.ids(task, name))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
