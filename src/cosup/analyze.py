"""The sequence space and the token space of a model, checkpoint by checkpoint: what they are like and how they move.

Shapes: P passages, Q questions, T token states, V vocabulary, D hidden size, k neighbours.

The paper holds that the pretrained token space steadies the new sequence space. Here both are measured in the same way,
so that runs with and without `ntp` can be compared.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cosup.config import UserError
from cosup.data import Passage, Question
from cosup.data.convert import convert
from cosup.files import atomic_file
from cosup.metrics import spaces, success_at
from cosup.model import CoSupModel
from cosup.train import checkpoints_in, export_model, is_checkpoint

_NEIGHBOURS = 10

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Space:
    """What searches a space and what is found in it.

    Args:
        queries_QD: states that search.
        vectors_ND: what can be found.
        targets_Q: for each query, the row that is right.
    """

    queries_QD: Array
    vectors_ND: Array
    targets_Q: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    """One space at one checkpoint; see `cosup.metrics.spaces` for the figures.

    Args:
        alignment: of queries with what they should find.
        uniformity, query_uniformity: of the vectors, and of the queries.
        effective_rank, query_effective_rank: of either.
        hubness: over the 10 nearest.
        success: the share of queries that find the right one first.
    """

    alignment: float
    uniformity: float
    query_uniformity: float
    effective_rank: float
    query_effective_rank: float
    hubness: float
    success: float


@dataclass(frozen=True, slots=True)
class Move:
    """One space between two checkpoints.

    Args:
        drift: mean cosine distance of each vector from where it was.
        drift_up_to_rotation: what remains of it after the best rotation.
        query_drift: of the queries.
        overlap: the share of the 10 nearest that stay.
        stale_success: of the later queries in the earlier vectors, as with an index that was not built again.
    """

    drift: float
    drift_up_to_rotation: float
    query_drift: float
    overlap: float
    stale_success: float


def analyze_models(
    folders: Sequence[Path],
    passages: Sequence[Passage],
    questions: Sequence[Question],
    out: Path,
    *,
    most: int = 2000,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Measures both spaces of each model and how they moved since the one before; writes JSON, Markdown and a plot.

    Args:
        folders: model folders, run folders or checkpoints, in the order of training; the untrained model may be the
            first. See `stages` for whole folders of checkpoints.
        passages: a corpus that holds the gold passages.
        questions: those with a gold passage are asked.
        out: the folder for `spaces.json`, `spaces.md` and `spaces.png`.
        most: of passages, questions, token states and rows of the LM head; more are drawn from at random.
        seed: of the drawing, which is the same for all models.
        on_progress: is told how many models are done.

    Returns:
        What `spaces.json` holds: by space, a list of shapes and a list of moves.

    Raises:
        UserError: there is no model, no question with a gold passage and an answer, or two models that can't be
            compared because their sizes or vocabularies differ.
    """
    if not folders:
        raise UserError("there is no model to look at: name at least one model folder")
    corpus, asked = _drawn(passages, questions, most, np.random.default_rng(seed))
    shapes: dict[str, list[Shape]] = {"sequence": [], "token": []}
    moves: dict[str, list[Move]] = {"sequence": [], "token": []}
    before: dict[str, Space] = {}
    for done, folder in enumerate(folders, start=1):
        model = open_stage(folder)
        now = {
            "sequence": sequence_space(model, corpus, asked),
            "token": token_space(model, corpus, asked, most=most, rng=np.random.default_rng(seed)),
        }
        del model
        for name, space in now.items():
            shapes[name].append(shape(space))
            if before:
                moves[name].append(move(before[name], space))
        before = now
        on_progress(done)
    found = {
        "models": [str(folder) for folder in folders],
        "passages": len(corpus),
        "questions": len(asked),
        "spaces": {
            name: {"shapes": [asdict(s) for s in shapes[name]], "moves": [asdict(m) for m in moves[name]]}
            for name in shapes
        },
    }
    _write(found, out)
    return found


def stages(folders: Sequence[Path]) -> list[Path]:
    """The folders, with the checkpoints in the place of a run's folder of checkpoints, in the order of their steps."""
    return [stage for folder in folders for stage in checkpoints_in(folder) or [folder]]


def open_stage(folder: Path) -> CoSupModel:
    """The model of a model folder, a run folder or a checkpoint.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not is_checkpoint(folder):
        return CoSupModel.load(folder)
    with tempfile.TemporaryDirectory() as place:  # as it would be exported: adapters are merged on the way
        export_model(folder, Path(place) / "model")
        return CoSupModel.load(Path(place) / "model")


def sequence_space(model: CoSupModel, passages: Sequence[Passage], questions: Sequence[Question]) -> Space:
    """Forced retrieval states of questions, the passages' vectors, and each question's first gold passage."""
    prompts = [model.template.prompt(question.question, task=question.task) for question in questions]
    rows = {passage.id: row for row, passage in enumerate(passages)}
    targets = np.array([rows[question.gold[0]] for question in questions], np.int64)
    return Space(model.query(prompts), model.embed_passages(passages), targets)


@torch.inference_mode()
def token_space(
    model: CoSupModel,
    passages: Sequence[Passage],
    questions: Sequence[Question],
    *,
    most: int,
    rng: np.random.Generator,
) -> Space:
    """Gen's states before the tokens that it must produce, rows of its LM head, and each state's own token.

    At most `most` states are taken, and `most` rows: those that are some state's token, and others drawn at random.
    """
    by_id = {passage.id: passage for passage in passages}
    kept = [_only_known(question, by_id) for question in questions]
    states, tokens = [], []
    for example in convert(kept, passages=by_id):
        rendered = model.template.render(example, by_id)
        own, next_ids = _states_and_tokens(model, rendered.ids, rendered.labels)
        states.append(own)
        tokens += next_ids
        if len(tokens) >= most:
            break
    if not tokens:
        raise UserError("no question has both a gold passage and an answer, so there is no token state to look at")
    head_VD = model.gen.get_output_embeddings().weight.float().cpu().numpy()
    wanted = sorted(set(tokens[:most]))
    others = np.setdiff1d(np.arange(len(head_VD)), wanted)
    drawn = rng.permutation(others)[: max(0, most - len(wanted))]
    rows = np.concatenate([np.array(wanted, np.int64), drawn])
    place = {token: row for row, token in enumerate(rows.tolist())}
    targets = np.array([place[token] for token in tokens[:most]], np.int64)
    return Space(np.concatenate(states)[:most], head_VD[rows], targets)


def shape(space: Space) -> Shape:
    """The figures of a space."""
    found_QK = spaces.nearest(space.queries_QD, space.vectors_ND, _NEIGHBOURS)
    return Shape(
        alignment=spaces.alignment(space.queries_QD, space.vectors_ND[space.targets_Q]),
        uniformity=spaces.uniformity(space.vectors_ND),
        query_uniformity=spaces.uniformity(space.queries_QD),
        effective_rank=spaces.effective_rank(space.vectors_ND),
        query_effective_rank=spaces.effective_rank(space.queries_QD),
        hubness=spaces.hubness(found_QK, len(space.vectors_ND)),
        success=_success(found_QK, space.targets_Q),
    )


def move(before: Space, after: Space) -> Move:
    """How a space moved.

    Raises:
        UserError: the two are not of the same size, because the models or their vocabularies differ.
    """
    if before.vectors_ND.shape != after.vectors_ND.shape or before.queries_QD.shape != after.queries_QD.shape:
        raise UserError(
            f"two models can't be compared: their spaces have shapes {list(before.vectors_ND.shape)} and "
            f"{list(after.vectors_ND.shape)}; name checkpoints of one training run"
        )
    old_QK = spaces.nearest(before.queries_QD, before.vectors_ND, _NEIGHBOURS)
    new_QK = spaces.nearest(after.queries_QD, after.vectors_ND, _NEIGHBOURS)
    stale_QK = spaces.nearest(after.queries_QD, before.vectors_ND, 1)
    return Move(
        drift=spaces.drift(before.vectors_ND, after.vectors_ND),
        drift_up_to_rotation=spaces.drift_up_to_rotation(before.vectors_ND, after.vectors_ND),
        query_drift=spaces.drift(before.queries_QD, after.queries_QD),
        overlap=spaces.overlap(old_QK, new_QK),
        stale_success=_success(stale_QK, after.targets_Q),
    )


def _success(found_QK: spaces.Rows, targets_Q: npt.NDArray[np.int64]) -> float:
    hits = [
        success_at([str(row) for row in found[:1]], [str(target)], k=1)
        for found, target in zip(found_QK, targets_Q, strict=True)
    ]
    return float(np.mean(hits))


def _states_and_tokens(model: CoSupModel, ids: Sequence[int], labels: Sequence[int]) -> tuple[Array, list[int]]:
    """States [T, D] before the labelled tokens of one sequence, and these tokens."""
    places = [place for place in range(1, len(ids)) if labels[place] >= 0]
    ids_1T = torch.tensor([list(ids)], device=model.device)
    out = model.gen.base_model(input_ids=ids_1T, seq_lens=torch.tensor([len(ids)]), use_cache=False)
    states: Array = out.last_hidden_state[0, [place - 1 for place in places]].float().cpu().numpy()
    return states, [labels[place] for place in places]


def _drawn(
    passages: Sequence[Passage], questions: Sequence[Question], most: int, rng: np.random.Generator
) -> tuple[list[Passage], list[Question]]:
    """Questions whose gold is there, and passages, theirs among them."""
    by_id = {passage.id: passage for passage in passages}
    known = [question for question in questions if question.gold and question.gold[0] in by_id]
    if len(known) < 2 or len(by_id) <= _NEIGHBOURS:
        raise UserError(
            f"there are {len(known)} questions with a gold passage and {len(by_id)} passages; it takes at least 2, "
            f"and more than {_NEIGHBOURS} passages"
        )
    asked = [known[row] for row in sorted(rng.permutation(len(known))[:most])]
    gold = list(dict.fromkeys(id for question in asked for id in question.gold if id in by_id))
    rest = [id for id in by_id if id not in set(gold)]
    others = [rest[row] for row in sorted(rng.permutation(len(rest))[: max(0, most - len(gold))])]
    return [by_id[id] for id in (*gold, *others)], asked


def _only_known(question: Question, by_id: Mapping[str, Passage]) -> Question:
    gold = [id for id in question.gold if id in by_id]
    return Question(
        question.id,
        question.task,
        question.question,
        answers=question.answers,
        gold=gold,
        long_answers=question.long_answers,
        qa_pairs=question.qa_pairs,
    )


def _write(found: dict[str, Any], out: Path) -> None:
    with atomic_file(out / "spaces.json") as file:
        file.write((json.dumps(found, indent=2) + "\n").encode())
    with atomic_file(out / "spaces.md") as file:
        file.write(_markdown(found).encode())
    with atomic_file(out / "spaces.png") as file:
        _plot(found).savefig(file, format="png", dpi=110)


def _markdown(found: dict[str, Any]) -> str:
    parts = [f"# Spaces\n\n{found['passages']:,} passages, {found['questions']:,} questions.\n"]
    for name, space in found["spaces"].items():
        for kind, first in (("shapes", 0), ("moves", 1)):
            rows = space[kind]
            if not rows:
                continue
            columns = list(rows[0])
            parts.append(f"## {name} space: {'each model' if kind == 'shapes' else 'since the model before'}\n")
            parts.append("| model | " + " | ".join(columns) + " |\n| --- |" + " --: |" * len(columns))
            for folder, row in zip(found["models"][first:], rows, strict=True):
                parts.append(f"| {folder} | " + " | ".join(f"{row[column]:.4f}" for column in columns) + " |")
            parts.append("")
    return "\n".join(parts)


def _plot(found: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    kinds = [
        ("shapes", "alignment"), ("shapes", "uniformity"), ("shapes", "effective_rank"), ("shapes", "hubness"),
        ("moves", "drift"), ("moves", "drift_up_to_rotation"), ("moves", "overlap"), ("moves", "stale_success"),
    ]  # fmt: skip
    plot = Figure(figsize=(12, 5.6), layout="constrained")
    for axes, (kind, name) in zip(plot.subplots(2, 4).flat, kinds, strict=True):
        for space, colour in (("sequence", "#3b6fb6"), ("token", "#d1662f")):
            rows = found["spaces"][space][kind]
            steps = range(1 if kind == "moves" else 0, len(found["models"]))
            axes.plot(steps, [row[name] for row in rows], "o-", color=colour, label=f"{space} space")
        axes.set_title(name.replace("_", " "), fontsize=10)
        names = [Path(folder).name for folder in found["models"]]
        axes.set_xticks(range(len(names)), names, fontsize=7, rotation=30, ha="right")
        axes.grid(axis="y", color="#ddd", linewidth=0.6)
    plot.axes[0].legend(frameon=False, fontsize=8)
    return plot
