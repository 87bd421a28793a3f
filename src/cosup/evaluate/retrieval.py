"""What a question may retrieve from: the whole corpus, its own candidates, or what BM25 finds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cosup.config import UserError
from cosup.data import Question
from cosup.index import BM25, Hit, HybridIndex, Index
from cosup.index.protocol import Vectors

QUESTION = "cosup.question"
"""The key of `where` by which a search says for which question it is."""


class QuestionIndex(HybridIndex):
    """An index in which each question finds only what is its own.

    A search whose `where` names a question by `QUESTION` chooses from its passages; another one from all.

    Args:
        index: what it wraps.
        candidates: ids by question, all of them in the index, from which the nearest are found.
        rankings: ids by question, best first, which are found whatever the query; their score is one over the rank.
    """

    def __init__(
        self,
        index: Index,
        *,
        candidates: Mapping[str, Sequence[str]] | None = None,
        rankings: Mapping[str, Sequence[str]] | None = None,
    ):
        self._whole = HybridIndex.of(index)
        super().__init__(self._whole)
        self._candidates, self._rankings = candidates or {}, rankings or {}

    @property
    def bm25(self) -> BM25:
        """That of the index that it wraps."""
        return self._whole.bm25

    def _near(self, queries_QD: Vectors, k: int, where: Mapping[str, Any] | None) -> list[list[Hit]]:
        rest = dict(where or {})
        question = rest.pop(QUESTION, None)
        if question in self._rankings:
            hits = [Hit(id, 1.0 / rank) for rank, id in enumerate(self._rankings[question][:k], start=1)]
            return [hits for _ in queries_QD]
        if question in self._candidates:
            return _nearest(self._index, queries_QD, self._candidates[question], k)
        return self._index.search(queries_QD, k, where=rest or None)


def own_candidates(questions: Sequence[Question]) -> dict[str, list[str]]:
    """The candidates of those questions that bring some."""
    return {question.id: question.candidates for question in questions if question.candidates}


def bm25_rankings(
    questions: Sequence[Question], index: HybridIndex, *, k: int, candidates: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """What BM25 finds for each question, among its candidates where it has some, else among all passages."""
    free = [question for question in questions if question.id not in candidates]
    found = index.bm25.search([question.question for question in free], k) if free else []
    rankings = {question.id: ids for question, ids in zip(free, found, strict=True)}
    for question in questions:
        if question.id in candidates:
            own = BM25(index.get(candidates[question.id]))
            (rankings[question.id],) = own.search([question.question], k)
    return rankings


def _nearest(index: Index, queries_QD: Vectors, ids: Sequence[str], k: int) -> list[list[Hit]]:
    scores_QP = np.asarray(queries_QD, np.float32) @ index.vectors(ids).T
    order_QK = np.argsort(-scores_QP, axis=1, kind="stable")[:, :k]
    return [
        [Hit(ids[row], float(scores_P[row])) for row in order_K]
        for order_K, scores_P in zip(order_QK, scores_QP, strict=True)
    ]


def refuse_unknown_candidates(index: Index, candidates: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError if a question may choose from a passage that the index does not hold."""
    for question, ids in candidates.items():
        try:
            index.get(ids)
        except KeyError as e:
            raise UserError(
                f"question {question!r} may choose from passage {e.args[0]!r}, which the index does not hold; index "
                "the passages that come with the questions, or evaluate over the whole corpus"
            ) from None
