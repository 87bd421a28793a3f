"""What a question may retrieve from: the whole corpus, its own candidates, or what BM25 finds."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cosup.config import UserError
from cosup.data import Passage, Question
from cosup.index import BM25, Hit, Index
from cosup.index.protocol import Vectors

QUESTION = "cosup.question"
"""The key of `where` by which a search says for which question it is."""


class QuestionIndex:
    """An index in which each question finds only what is its own. See `cosup.index.Index` for the methods.

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
        self._index, self._candidates, self._rankings = index, candidates or {}, rankings or {}
        self.fingerprint, self.dim = index.fingerprint, index.dim

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._index)

    def search(self, queries_QD: Vectors, k: int, *, where: Mapping[str, Any] | None = None) -> list[list[Hit]]:
        """See `Index.search`."""
        rest = dict(where or {})
        question = rest.pop(QUESTION, None)
        if question in self._rankings:
            hits = [Hit(id, 1.0 / rank) for rank, id in enumerate(self._rankings[question][:k], start=1)]
            return [hits for _ in queries_QD]
        if question in self._candidates:
            return _nearest(self._index, queries_QD, self._candidates[question], k)
        return self._index.search(queries_QD, k, where=rest or None)

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """See `Index.get`."""
        return self._index.get(ids)

    def vectors(self, ids: Sequence[str]) -> Vectors:
        """See `Index.vectors`."""
        return self._index.vectors(ids)

    def add(self, passages: Sequence[Passage], vectors_PD: Vectors) -> None:
        """See `Index.add`."""
        self._index.add(passages, vectors_PD)

    def remove(self, ids: Sequence[str]) -> int:
        """See `Index.remove`."""
        return self._index.remove(ids)


def own_candidates(questions: Sequence[Question]) -> dict[str, list[str]]:
    """The candidates of those questions that bring some."""
    return {question.id: question.candidates for question in questions if question.candidates}


class Lexical:
    """BM25 over the passages of an index, made when it is first asked for.

    Args:
        index: whose passages are read once, then.
    """

    def __init__(self, index: Index):
        self._index = index

    def rankings(
        self, questions: Sequence[Question], *, k: int, candidates: Mapping[str, Sequence[str]]
    ) -> dict[str, list[str]]:
        """What it finds for each question, among its candidates where it has some, else among all passages."""
        free = [question for question in questions if question.id not in candidates]
        found = self._of_all.search([question.question for question in free], k) if free else []
        rankings = {question.id: ids for question, ids in zip(free, found, strict=True)}
        for question in questions:
            if question.id in candidates:
                own = BM25(self._index.get(candidates[question.id]))
                (rankings[question.id],) = own.search([question.question], k)
        return rankings

    @cached_property
    def _of_all(self) -> BM25:
        return BM25(list(self._index))


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
