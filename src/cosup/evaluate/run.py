"""An evaluation run: a folder that fills question by question, and goes on where it was stopped.

The folder holds `run.json`, what was evaluated and how; and for each data set a folder with `predictions.jsonl`, a
line as soon as a question is answered, `items.jsonl`, the judgements, `figures.json`, and `passages.jsonl`, those that
a reader of the results wants to see. What the model's run folder tells of its training is copied beside it.
"""

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
import yaml

from cosup.config import UserError
from cosup.data import Passage, write_records
from cosup.engine import Options, check_index
from cosup.evaluate.figures import Evaluation, Figure, Item, summarize
from cosup.evaluate.fluency import mauve
from cosup.evaluate.journal import read_journal
from cosup.evaluate.judge import PassageTexts, Prediction, judge, judge_entailment, pairs_of
from cosup.evaluate.model import ntp_loss, references, refuse_unknown_gold, verdicts
from cosup.evaluate.nli import CachedNli, Nli
from cosup.evaluate.predict import MODES, Asker, Mode
from cosup.evaluate.retrieval import own_candidates
from cosup.evaluate.tasks import Task
from cosup.files import atomic_file, sha256
from cosup.index import HybridIndex, Index
from cosup.model import AnswerSettings, CoSupModel

FORMAT_VERSION = 1
_SHOWN = 3  # passages of a retrieval that a report shows the text of

Counter = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]
"""Called with what is counted, how many there will be and their unit; gives an `on_progress`."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a run is made.

    Args:
        mode: `cosup`, `static`, `none`, or `bm25`: once, with the prompt, BM25's best passage.
        own_candidates: whether a question that brings candidates retrieves from these alone, as in the paper.
        options: of the engine; the mode comes from here.
        name: the condition; runs that differ only in the seed of their training share it.
        mauve_model: for MAUVE; not run without it.
    """

    mode: Mode = "cosup"
    own_candidates: bool = True
    options: Options = field(default_factory=Options)
    name: str = ""
    mauve_model: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if self.mode == "bm25" and self.options.hybrid:
            raise UserError("hybrid gives words a part in the model's search, and mode 'bm25' has none; leave one out")

    def settled(self, model: CoSupModel) -> Self:
        """These, with the model's own choices where there are none; words are all that BM25 searches by."""
        options = replace(self.options, hybrid=0.0) if self.mode == "bm25" else self.options
        return replace(self, options=options.settled(model.settings.answers))


def evaluate_tasks(
    model: CoSupModel,
    index: Index,
    tasks: Sequence[Task],
    out: Path,
    *,
    settings: RunSettings | None = None,
    source: Path | None = None,
    nli: Nli | None = None,
    counter: Counter = lambda what, total, unit: nullcontext(lambda done: None),
) -> dict[str, Evaluation]:
    """Asks and judges data sets; what an earlier, interrupted run of the same kind has asked is not asked again.

    Args:
        model: in evaluation mode.
        index: built by this model.
        tasks: see `read_tasks`.
        out: the run folder.
        settings: see there.
        source: the folder that the model was read from, for its name and its training's records.
        nli: judges citations; those figures are absent without it.
        counter: shows progress.

    Returns:
        The evaluation of each data set, by name.

    Raises:
        UserError: `out` holds a run of another model, index, mode or data set, or anything else; a gold passage or a
            candidate is not in the index.
    """
    settings = (settings or RunSettings()).settled(model)
    check_index(model, index)  # before a folder is begun that would be another run's
    for task in tasks:
        refuse_unknown_gold(task.questions, index)
    _open_run(
        out, _description(model, index, tasks, settings, source) | {"name": settings.name or _name_of(out)}, source
    )
    evaluations = {}
    index = HybridIndex.of(index)
    for task in tasks:
        predictions = _predictions(model, index, task, out / task.name, settings, counter)
        evaluations[task.name] = _judged(model, index, task, predictions, out, settings, nli, counter)
    return evaluations


def _name_of(out: Path) -> str:
    """What a run is called that was given no name: its folder, or the model whose `evaluations` it is."""
    return out.name if out.name != "evaluations" else out.resolve().parent.name


def remove_run(out: Path) -> None:
    """Removes an evaluation run. Raises UserError if the folder holds anything else; nothing is removed then."""
    if not out.exists():
        return
    _refuse_file(out)
    if not (out / "run.json").is_file() and any(out.iterdir()):
        raise UserError(f"{out} holds no evaluation run, so it is not removed; name another folder")
    tasks = _read_run(out)["tasks"] if any(out.iterdir()) else ()
    own = {"run.json", "training.jsonl", *tasks}
    others = [
        path for path in sorted(out.iterdir()) if path.name not in own and not path.name.startswith((".", "nli-"))
    ]
    if others:
        raise UserError(f"{others[0]} is no part of an evaluation run, so {out} is not removed; name another folder")
    shutil.rmtree(out)


def _refuse_file(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and a run is a folder; name another")


def _read_run(out: Path) -> dict[str, Any]:
    path = out / "run.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        return {**found, "tasks": dict(found["tasks"]), "options": dict(found["options"])}
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); remove {out} yourself, or name another folder") from None


def _predictions(
    model: CoSupModel,
    index: Index,
    task: Task,
    folder: Path,
    settings: RunSettings,
    counter: Counter,
) -> dict[str, Prediction]:
    path = folder / "predictions.jsonl"
    done = _read_predictions(path)
    left = [question for question in task.questions if question.id not in done]
    if not left:
        return done
    asker = Asker(
        model,
        index,
        left,
        options=settings.options if settings.mode == "bm25" else replace(settings.options, mode=settings.mode),
        bm25=settings.mode == "bm25",
        own=own_candidates(left) if settings.own_candidates else None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    what = f"asking {task.name}" + (f" ({len(done):,} answered before)" if done else "")
    with counter(what, len(left), "questions") as on_progress, path.open("ab") as file:
        for number, prediction in enumerate(asker.predict(left), start=1):
            file.write(json.dumps(asdict(prediction), ensure_ascii=False).encode() + b"\n")
            file.flush()
            done[prediction.id] = prediction
            on_progress(number)
    return done


def _read_predictions(path: Path) -> dict[str, Prediction]:
    """What was asked before, and answered: what failed may have had a reason that is gone."""
    again = "its questions are asked again"
    try:
        rows = [Prediction(**row) for row in read_journal(path, consequence=again)]
    except TypeError:
        raise UserError(f"{path} is not a file of predictions; remove it, so that {again}") from None
    return {row.id: row for row in rows if row.reason != "error"}


def _judged(
    model: CoSupModel,
    index: Index,
    task: Task,
    predictions: Mapping[str, Prediction],
    out: Path,
    settings: RunSettings,
    nli: Nli | None,
    counter: Counter,
) -> Evaluation:
    texts, labels = PassageTexts(index.get), verdicts(task.questions)
    items = [judge(question, predictions[question.id], texts=texts, labels=labels) for question in task.questions]
    if nli is not None:
        _judge_citations(task, items, texts, CachedNli(nli, out), counter)
    figures = summarize(items)
    figures["ntp"] = _ntp(model, index, task, out / task.name, counter)
    if settings.mauve_model:
        figures["mauve"] = _mauve(task, items, settings.mauve_model)
    evaluation = Evaluation(figures, items)
    folder = out / task.name
    write_records(folder / "passages.jsonl", _shown(items, texts))
    evaluation.write_into(folder)
    return evaluation


def _judge_citations(task: Task, items: Sequence[Item], texts: PassageTexts, nli: CachedNli, counter: Counter) -> None:
    pairs = [pair for q, item in zip(task.questions, items, strict=True) for pair in pairs_of(q, item, texts)]
    with counter(f"judging citations of {task.name}", len(set(pairs)), "pairs") as on_progress:
        nli.judge(pairs, on_progress=on_progress)
    for question, item in zip(task.questions, items, strict=True):
        item["scores"] |= judge_entailment(question, item, texts, nli.entails)


def _ntp(model: CoSupModel, index: Index, task: Task, folder: Path, counter: Counter) -> Figure:
    """Measured once: it depends on the model, the questions and the rules by which they become examples."""
    path = folder / "ntp.json"
    if path.is_file():
        return Figure(**json.loads(path.read_text("utf-8")))
    rendered = references(model, index, task.questions)
    with counter(f"ntp loss of {task.name}", len(rendered), "responses") as on_progress:
        figure = ntp_loss(model, rendered, on_progress=on_progress)
    with atomic_file(path) as file:
        file.write((json.dumps(asdict(figure)) + "\n").encode())
    return figure


def _mauve(task: Task, items: Sequence[Item], model: str) -> Figure:
    pairs = [
        (item["text"].strip() or "-", question.long_answers[0])
        for question, item in zip(task.questions, items, strict=True)
        if question.long_answers
    ]
    if len(pairs) < 2:
        return Figure(None, len(pairs))
    return Figure(mauve([text for text, _ in pairs], [reference for _, reference in pairs], model), len(pairs))


def _shown(items: Sequence[Item], texts: PassageTexts) -> Iterator[Passage]:
    ids: dict[str, None] = {}
    for item in items:
        ids |= dict.fromkeys([*item["cited"], *item["forced"][:_SHOWN]])
        ids |= dict.fromkeys(id for ranked in item["retrieved"] for id in ranked[:_SHOWN])
        for id in item["gold"]:
            if id not in ids and texts.has(id):
                ids[id] = None
    return (texts.passage(id) for id in ids)


def _description(
    model: CoSupModel, index: Index, tasks: Sequence[Task], settings: RunSettings, source: Path | None
) -> dict[str, Any]:
    options = asdict(replace(settings.options, mode="static" if settings.mode == "bm25" else settings.mode))
    return {
        "format_version": FORMAT_VERSION,
        "model": str(source or ""),
        "fingerprint": model.fingerprint,
        "gen": _weights(model.gen),
        "emb_parameters": sum(parameter.numel() for parameter in model.emb.parameters()),
        "index": {"fingerprint": index.fingerprint, "passages": len(index)},
        "corpus": _corpus(index),
        "mode": settings.mode,
        "own_candidates": settings.own_candidates,
        "options": options | {"stop": list(settings.options.stop)},
        "tasks": {
            task.name: {"file": task.path.name, "sha256": sha256(task.path), "questions": len(task.questions)}
            for task in tasks
        },
    }


_SAME = ("fingerprint", "gen", "index", "corpus", "mode", "own_candidates", "options")


def _corpus(index: Index) -> str:
    """The sum of the SHA-256 of all passages: one corpus has one, whatever the order in which it was written."""
    total = 0
    for passage in index:
        line = json.dumps([passage.id, passage.title, passage.text, passage.meta], sort_keys=True)
        total += int.from_bytes(hashlib.sha256(line.encode()).digest())
    return f"{total % 2**256:064x}"


def _weights(part: torch.nn.Module) -> str:
    """SHA-256 of the weights as they are in memory. Models that differ in Gen alone have one fingerprint."""
    digest = hashlib.sha256()
    for name, weight in part.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _open_run(out: Path, wanted: dict[str, Any], source: Path | None) -> None:
    path = out / "run.json"
    _refuse_file(out)
    if not path.is_file():
        if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise UserError(f"{out} holds something else than an evaluation run; name another folder")
        found: dict[str, Any] = {"tasks": {}}
    else:
        found = _read_run(out)
        by_default = asdict(Options().settled(AnswerSettings()))  # as what was no option yet was
        found["options"] = {**by_default, **found["options"]}
        _refuse_other(out, found, wanted)
    settings = {**wanted, "tasks": found["tasks"] | wanted["tasks"], "training": _training(source)}
    settings["created"] = found.get("created") or datetime.now(UTC).isoformat(timespec="seconds")
    settings["versions"] = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("cosup", "torch", "transformers")},
    }
    with atomic_file(path) as file:
        file.write((json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
    if source is not None and (source / "metrics.jsonl").is_file():
        with atomic_file(out / "training.jsonl") as file:
            file.write((source / "metrics.jsonl").read_bytes())


def _refuse_other(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in _SAME:
        if key in found and found[key] != wanted[key]:
            raise UserError(
                f"{out} holds a run with another {key} ({found[key]!r:.80}, not {wanted[key]!r:.80}); name another "
                "folder, or start it over with --fresh"
            )
    for name, task in wanted["tasks"].items():
        if found["tasks"].get(name, task) != task:
            raise UserError(
                f"{out} holds answers to another file {name!r}, or to another number of its questions; name another "
                "folder, or start it over with --fresh"
            )


def _training(source: Path | None) -> dict[str, Any] | None:
    """What the paper's figures need to know of the model's training, where its run folder tells."""
    if source is None or not (source / "recipe.yaml").is_file():
        return None
    recipe = yaml.safe_load((source / "recipe.yaml").read_text("utf-8"))
    return {
        "name": recipe.get("name", ""),
        "seed": recipe.get("seed", 0),
        "objective": recipe["train"].get("objective", ""),
        "lambda": recipe["train"].get("lambda"),
    }
