"""Judging a model and an index on questions in one go: retrieval, answers, form, and the `ntp` loss."""

from collections.abc import Callable, Sequence

import torch

from cosup.config import UserError
from cosup.data import Question
from cosup.data.convert import convert
from cosup.engine import Options
from cosup.evaluate.figures import Evaluation, Figure, summarize
from cosup.evaluate.judge import PassageTexts, judge
from cosup.evaluate.predict import Asker
from cosup.index import Index
from cosup.model import CoSupModel, batches_by_tokens, pack
from cosup.template import Rendered

_TOKENS_PER_BATCH = 4096


def evaluate_model(
    model: CoSupModel,
    index: Index,
    questions: Sequence[Question],
    *,
    options: Options | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Asks every question, greedily unless `options` says otherwise, and judges.

    Retrieval is judged twice over the questions that have a gold passage: forced, with `[Ret]` put right after the
    prompt, and free, by the model's own first retrieval, where none counts as wrong. A question with several golds is
    right when any of them is found. Answers are judged over the questions that have one. Every question is scored: one
    that fails or cites nothing scores 0.

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
    refuse_unknown_gold(questions, index)
    asker = Asker(model, index, questions, options=options)
    predictions = {}
    for prediction in asker.predict(questions):
        predictions[prediction.id] = prediction
        on_progress(len(predictions))
    texts, labels = PassageTexts(index.get), verdicts(questions)
    items = [judge(question, predictions[question.id], texts=texts, labels=labels) for question in questions]
    figures = summarize(items)
    figures["ntp"] = ntp_loss(model, references(model, index, questions))
    return Evaluation(figures, items)


def verdicts(questions: Sequence[Question]) -> list[str]:
    """Every verdict that some question has."""
    return list(dict.fromkeys(question.label for question in questions if question.label))


def references(model: CoSupModel, index: Index, questions: Sequence[Question]) -> list[Rendered]:
    """What should be written, for the questions whose gold passages the index holds and whose answers are known."""
    judged = [question for question in questions if question.gold and not missing(question.gold, index)]
    ids = [id for question in judged for id in question.gold]
    ids += [id for question in judged for id in question.negatives if not missing([id], index)]
    known = dict(zip(ids, index.get(ids), strict=True))  # by the id that was asked for, also of a duplicate
    kept = [question for question in judged if all(id in known for id in question.negatives)]
    return [model.template.render(example, known) for example in convert(kept, passages=known)]


@torch.inference_mode()
def ntp_loss(
    model: CoSupModel, rendered: Sequence[Rendered], *, on_progress: Callable[[int], None] = lambda done: None
) -> Figure:
    """Mean cross-entropy over the tokens that Gen must produce itself in these sequences, and their number.

    Args:
        model: in evaluation mode.
        rendered: see `references`.
        on_progress: is told how many sequences are done.
    """
    total, count, done = 0.0, 0, 0
    for rows in batches_by_tokens([len(row.ids) for row in rendered], _TOKENS_PER_BATCH):
        batch = pack([rendered[row] for row in rows])
        moved = {key: x.to(model.device) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
        output = model(moved)
        total, count = total + float(output.ntp_sum), count + output.ntp_count
        on_progress(done := done + len(rows))
    return Figure(total / count if count else None, count)


def missing(ids: Sequence[str], index: Index) -> str:
    """The first of these ids that the index does not hold; empty where it holds all."""
    try:
        index.get(ids)
    except KeyError as e:
        return str(e.args[0])
    return ""


def refuse_unknown_gold(questions: Sequence[Question], index: Index) -> None:
    """Raises UserError if a question is judged by a passage that can't be found because the index does not hold it.

    Questions that name pages too are judged by these where the passage is missing.
    """
    for question in questions:
        if not question.pages and (id := missing(question.gold, index)):
            raise UserError(
                f"question {question.id!r} cites passage {id!r}, which the index does not hold; "
                "index the file that holds it, or remove the citation"
            )
