"""Asking questions through the engine, each prediction as soon as it is finished."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from cosup.config import UserError
from cosup.data import Question
from cosup.engine import Engine, Finished, Options
from cosup.evaluate.judge import DEPTH, Prediction
from cosup.evaluate.retrieval import QUESTION, QuestionIndex, bm25_rankings, refuse_unknown_candidates
from cosup.index import Index
from cosup.model import CoSupModel

Mode = Literal["cosup", "static", "none", "bm25"]
MODES: tuple[Mode, ...] = ("cosup", "static", "none", "bm25")

_CHUNK = 64  # questions whose forced retrievals are computed together


class Asker:
    """A model with an index, asked in one mode.

    Args:
        model: in evaluation mode.
        index: built by this model.
        questions: all that will be asked; BM25 ranks for them.
        options: of the engine; its `mode` is the mode unless `bm25` is said.
        bm25: whether the passage is retrieved once, with the prompt, by BM25 in the model's place.
        own: ids that each question may choose from; questions that are not named here choose from the whole corpus.

    Raises:
        UserError: the index is another model's, or does not hold a candidate.
    """

    def __init__(
        self,
        model: CoSupModel,
        index: Index,
        questions: Sequence[Question],
        *,
        options: Options | None = None,
        bm25: bool = False,
        own: dict[str, list[str]] | None = None,
    ):
        options = options or Options()
        self._options = replace(options, candidates=max(DEPTH, options.candidates))
        if bm25:
            self._options = replace(self._options, mode="static")
        self._model, own = model, own or {}
        refuse_unknown_candidates(index, own)
        self._bm25 = bm25_rankings(questions, list(index), k=DEPTH, candidates=own)
        self._per_question = {question.id for question in questions if bm25 or question.id in own}
        self._index = QuestionIndex(index, candidates=own, rankings=self._bm25 if bm25 else None)
        self._engine = Engine(model, self._index, self._options)

    def predict(self, questions: Sequence[Question]) -> Iterator[Prediction]:
        """Predictions in the order in which they are finished; a question that can't be asked gives one that says why.

        Args:
            questions: some of those that were named at the start.
        """
        session = self._engine.session()
        chunks = iter([questions[start : start + _CHUNK] for start in range(0, len(questions), _CHUNK)])
        asked: dict[int, tuple[Question, list[str]]] = {}
        while True:
            if not session.waiting and (chunk := next(chunks, None)):
                for question, forced in zip(chunk, self._forced(chunk), strict=True):
                    try:
                        asked[session.submit(self._prompt(question), options=self._own(question))] = question, forced
                    except UserError as e:
                        yield self._failed(question, str(e))
                continue
            if not session.active and not session.waiting:
                return
            for number, event in session.step():
                if isinstance(event, Finished):
                    question, forced = asked.pop(number)
                    yield Prediction.of(question.id, event.response, forced=forced, bm25=self._bm25[question.id])

    def _prompt(self, question: Question) -> list[int]:
        return self._model.template.prompt(question.question, task=question.task)

    def _where(self, question: Question) -> dict[str, str] | None:
        return {QUESTION: question.id} if question.id in self._per_question else self._options.where  # type: ignore[return-value]

    def _own(self, question: Question) -> Options:
        return replace(self._options, where=self._where(question))

    def _forced(self, questions: Sequence[Question]) -> list[list[str]]:
        """The forced retrieval of each question; none where the mode never retrieves or the prompt is too long."""
        forced: list[list[str]] = [[] for _ in questions]
        if self._options.mode == "none":
            return forced
        prompts = [self._prompt(question) for question in questions]
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) < self._model.context]
        if not rows:
            return forced
        queries_QD = self._model.query([prompts[row] for row in rows])
        wheres = [self._where(questions[row]) for row in rows]
        if all(where == wheres[0] for where in wheres):
            found = self._index.search(queries_QD, DEPTH, where=wheres[0])
        else:
            found = [
                self._index.search(query_1D, DEPTH, where=where)[0]
                for query_1D, where in zip(np.split(queries_QD, len(rows)), wheres, strict=True)
            ]
        for row, hits in zip(rows, found, strict=True):
            forced[row] = [hit.id for hit in hits]
        return forced

    def _failed(self, question: Question, error: str) -> Prediction:
        return Prediction(question.id, bm25=self._bm25[question.id], reason="error", error=error)
