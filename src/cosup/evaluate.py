"""Judging a model and an index on questions: retrieval, answers, form, and the `ntp` loss, each with its count."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cosup import metrics
from cosup.config import UserError
from cosup.data import Question
from cosup.data.convert import convert
from cosup.engine import Engine, Options
from cosup.files import atomic_folder
from cosup.index import BM25, FlatIndex
from cosup.model import CoSupModel, batches_by_tokens, pack
from cosup.template import Response

_DEPTH = 5
_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value and how many questions (tokens, for `ntp`) it was measured on; None where there were none."""

    value: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found.

    Args:
        figures: by name; see `LABELS`.
        items: for each question, what was retrieved and answered, and the judgement on it.
    """

    figures: dict[str, Figure]
    items: list[dict[str, Any]]

    def save(self, folder: Path) -> None:
        """Writes `figures.json` and `items.jsonl`."""
        with atomic_folder(folder, marker="figures.json") as new:
            figures = {name: asdict(figure) for name, figure in self.figures.items()}
            (new / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in self.items)
            (new / "items.jsonl").write_text("".join(lines), encoding="utf-8")


LABELS = {
    "forced_success@1": "retrieval success@1, forced",
    "forced_success@5": "retrieval success@5, forced",
    "free_success@1": "retrieval success@1, free",
    "free_success@5": "retrieval success@5, free",
    "bm25_success@1": "BM25 success@1",
    "bm25_success@5": "BM25 success@5",
    "answer_accuracy": "answer accuracy (a gold answer stands in the claims)",
    "exact_match": "exact match of the last claim",
    "token_f1": "token F1 of the last claim",
    "claim_words": "median words in a claim",
    "well_formed": "share of well-formed outputs",
    "cites": "share of outputs that cite",
    "ntp": "ntp loss (nats per token)",
}


def evaluate_model(
    model: CoSupModel,
    index: FlatIndex,
    questions: Sequence[Question],
    *,
    options: Options | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Asks every question, greedily, and judges.

    Retrieval is judged twice over the questions that have a gold passage: forced, with `[Ret]` put right after the
    prompt, and free, by the model's own first retrieval, where none counts as wrong. A question with several golds is
    right when any of them is found. Answers are judged over the questions that have one.

    Args:
        model: in evaluation mode.
        index: built by this model; its passages are BM25's corpus too.
        questions: with distinct ids.
        options: of the engine.
        on_progress: is told how many questions are done.

    Raises:
        UserError: there are no questions, one cites a passage that the index does not hold, or the index is another
            model's.
    """
    if not questions:
        raise UserError("there are no questions to ask: name a file with at least one")
    engine = Engine(model, index, options)
    passages = list(index)
    known = {passage.id: passage.title for passage in passages}
    examples = list(convert(questions, passages=known, titles=known))
    prompts = [model.template.prompt(question.question, task=question.task) for question in questions]
    forced = [[hit.id for hit in hits] for hits in index.search(model.query(prompts), _DEPTH)]
    bm25 = BM25(passages).search([question.question for question in questions], _DEPTH)
    responses = engine.generate(prompts, on_progress=on_progress)
    items = [
        _judge(question, forced=ranked, bm25=words, response=response)
        for question, ranked, words, response in zip(questions, forced, bm25, responses, strict=True)
    ]
    rendered = [
        model.template.render(example, {p.id: p for p in index.get([part.passage for part in example.evidence])})
        for example in examples
    ]
    figures = {name: _mean(items, name) for name in LABELS if name not in ("claim_words", "ntp")}
    lengths = [len(claim.split()) for item in items for claim in item["claims"]]
    figures["claim_words"] = Figure(statistics.median(lengths) if lengths else None, len(lengths))
    figures["ntp"] = ntp_loss(model, rendered)
    return Evaluation({name: figures[name] for name in LABELS}, items)


@torch.inference_mode()
def ntp_loss(model: CoSupModel, rendered: Sequence[Any]) -> Figure:
    """Mean cross-entropy over the tokens that Gen must produce itself in these sequences, and their number."""
    total, count = 0.0, 0
    for rows in batches_by_tokens([len(row.ids) for row in rendered], _TOKENS_PER_BATCH):
        batch = pack([rendered[row] for row in rows])
        moved = {key: x.to(model.device) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
        output = model(moved)
        total, count = total + float(output.ntp_sum), count + output.ntp_count
    return Figure(total / count if count else None, count)


def _judge(question: Question, *, forced: list[str], bm25: list[str], response: Response) -> dict[str, Any]:
    """One question's outcome; judgements that it has no reference for are absent."""
    claims = [claim.text for claim in response.claims]
    free = list(response.retrieved[0]) if response.retrieved else []
    item: dict[str, Any] = {
        "id": question.id,
        "question": question.question,
        "text": response.text,
        "claims": claims,
        "cited": [claim.passage for claim in response.claims],
        "forced": forced,
        "retrieved": [list(ids) for ids in response.retrieved],
        "reason": response.reason,
        "well_formed": float(response.well_formed),
        "cites": float(bool(claims)),
    }
    if question.gold:
        for name, ranked in (("forced", forced), ("free", free), ("bm25", bm25)):
            for k in (1, _DEPTH):
                item[f"{name}_success@{k}"] = metrics.success_at(ranked, question.gold, k=k)
    if question.answers:
        last = claims[-1] if claims else ""
        item["answer_accuracy"] = float(metrics.answer_in(" ".join(claims), question.answers))
        item["exact_match"] = metrics.exact_match(last, question.answers)
        item["token_f1"] = metrics.token_f1(last, question.answers)
    return item


def _mean(items: Sequence[Mapping[str, Any]], name: str) -> Figure:
    values = [item[name] for item in items if name in item]
    return Figure(statistics.fmean(values) if values else None, len(values))
