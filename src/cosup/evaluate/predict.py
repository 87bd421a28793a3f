"""Asking questions through the engine, each prediction as soon as it is finished."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from cosup.config import UserError
from cosup.data import Question
from cosup.engine import Engine, Event, Finished, Options, Retrieved, Token
from cosup.evaluate.judge import DEPTH, Prediction
from cosup.evaluate.retrieval import QUESTION, QuestionIndex, bm25_rankings, refuse_unknown_candidates
from cosup.index import HybridIndex, Index
from cosup.model import CoSupModel
from cosup.template import Response

Mode = Literal["cosup", "static", "none", "bm25"]
MODES: tuple[Mode, ...] = ("cosup", "static", "none", "bm25")


class Asker:
    """A model with an index, asked in one mode.

    Args:
        model: in evaluation mode.
        index: built by this model; a `HybridIndex` makes BM25 once for all that ask it.
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
        options = (options or Options()).settled(model.settings.answers)
        self._options = replace(options, candidates=max(DEPTH, options.candidates))
        if bm25:
            self._options = replace(self._options, mode="static")
        self._model, own = model, own or {}
        refuse_unknown_candidates(index, own)
        whole = HybridIndex.of(index)
        self._bm25 = bm25_rankings(questions, whole, k=DEPTH, candidates=own)
        self._per_question = {question.id for question in questions if bm25 or question.id in own}
        self._index = QuestionIndex(whole, candidates=own, rankings=self._bm25 if bm25 else None)
        self._engine = Engine(model, self._index, self._options)

    def predict(self, questions: Sequence[Question]) -> Iterator[Prediction]:
        """Predictions in the order in which they are finished; a question that can't be asked gives one that says why.

        Args:
            questions: some of those that were named at the start.
        """
        session = self._engine.session()
        asked: dict[int, Question] = {}
        begun: dict[int, Event] = {}
        for question in questions:
            try:
                asked[session.submit(self._prompt(question), options=self._own(question))] = question
            except UserError as e:
                forced = None if self._options.mode == "none" else ()
                yield Prediction(question.id, forced=forced, bm25=self._bm25[question.id], reason="error", error=str(e))
        while asked:
            finished = []
            for number, event in session.step():
                first = begun.setdefault(number, event)
                if isinstance(event, Finished):
                    finished.append((asked.pop(number), first, event.response))
            yield from self._predictions(finished)

    def _predictions(self, finished: Sequence[tuple[Question, Event, Response]]) -> Iterator[Prediction]:
        """Of finished questions with the first event of each, which tells whether a retrieval came right away."""
        free = {question.id: self._after_prompt(first, response) for question, first, response in finished}
        rest = [question for question, _, _ in finished if free[question.id] is None]
        forced = dict(zip((question.id for question in rest), self._forced(rest), strict=True))
        for question, _, response in finished:
            ranked = free[question.id]
            ranked = forced[question.id] if ranked is None else ranked
            yield Prediction.of(question.id, response, forced=ranked, bm25=self._bm25[question.id])

    def _after_prompt(self, first: Event, response: Response) -> Sequence[str] | None:
        """What the model's own `[Ret]` right after the prompt found: the forced retrieval, at no further cost."""
        began = isinstance(first, Retrieved) or (isinstance(first, Token) and first.id == self._model.template.ret)
        return response.retrieved[0][:DEPTH] if began and response.retrieved else None

    def _prompt(self, question: Question) -> list[int]:
        return self._model.template.prompt(question.question, task=question.task)

    def _where(self, question: Question) -> dict[str, str] | None:
        return {QUESTION: question.id} if question.id in self._per_question else self._options.where  # type: ignore[return-value]

    def _own(self, question: Question) -> Options:
        return replace(self._options, where=self._where(question))

    def _forced(self, questions: Sequence[Question]) -> Sequence[Sequence[str] | None]:
        """The forced retrieval of each question; None where the mode never retrieves."""
        if self._options.mode == "none" or not questions:
            return [None] * len(questions)
        queries_QD = self._model.query([self._prompt(question) for question in questions])
        wheres = [self._where(question) for question in questions]
        words, weight = [question.question for question in questions], self._options.hybrid or 0.0
        if all(where == wheres[0] for where in wheres):
            found = self._index.search(queries_QD, DEPTH, where=wheres[0], words=words, weight=weight)
        else:
            found = [
                self._index.search(query_1D, DEPTH, where=where, words=[text], weight=weight)[0]
                for query_1D, where, text in zip(np.split(queries_QD, len(questions)), wheres, words, strict=True)
            ]
        return [[hit.id for hit in hits] for hits in found]
