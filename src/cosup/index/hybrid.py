"""Searching by the state and by words at once: the inner product, and something more for words in common."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cosup.config import UserError
from cosup.data import Passage
from cosup.index.bm25 import BM25
from cosup.index.kept import bm25_of
from cosup.index.lookup import meta_keys
from cosup.index.parts import parts_of
from cosup.index.protocol import Hit, Index, Vectors, WrappedIndex

POOL = 100
"""So many passages are taken from either search, at least, before they are ranked by both."""


class HybridIndex(WrappedIndex):
    """An index that is searched by words too, where that is wanted.

    Args:
        index: what it wraps.
    """

    def __init__(self, index: Index):
        super().__init__(index)
        self._bm25: BM25 | None = None

    @classmethod
    def of(cls, index: Index) -> "HybridIndex":
        """An index that can be searched by words: itself, or around it."""
        return index if isinstance(index, cls) else cls(index)

    @property
    def bm25(self) -> BM25:
        """BM25 over all passages, in memory from when it is first asked for; it follows changes made here."""
        if self._bm25 is None:
            self._bm25 = bm25_of(self._index)
        return self._bm25

    def search(
        self,
        queries_QD: Vectors,
        k: int,
        *,
        where: Mapping[str, Any] | None = None,
        words: Sequence[str] = (),
        weight: float = 0.0,
    ) -> list[list[Hit]]:
        """The k best passages of each query. See `Index.search`.

        A passage is ranked by its inner product with the query and, besides, `weight` times its BM25 score over the
        best BM25 score in the index: the one that shares most with the words gains `weight`, one that shares nothing
        gains nothing. Hits hold the inner product alone.

        Args:
            queries_QD: float32 [Q, D].
            k: how many.
            where: values that `meta` must have.
            words: Q texts.
            weight: 0: the words make no difference, and BM25 is not asked.

        Raises:
            UserError: the weight is less than 0, or not finite.
        """
        if not 0 <= weight < math.inf:
            raise UserError(f"the weight of words must be 0 or more, not {weight!r}")
        if not weight or k < 1:
            return self._near(queries_QD, k, where)
        near = self._near(queries_QD, max(k, POOL), where)
        return [
            self._ranked(query_D, hits, text, k, weight, where)
            for query_D, hits, text in zip(queries_QD, near, words, strict=True)
        ]

    def _near(self, queries_QD: Vectors, k: int, where: Mapping[str, Any] | None) -> list[list[Hit]]:
        """The k nearest passages of each query, by the inner product alone."""
        return self._index.search(queries_QD, k, where=where)

    def _ranked(
        self, query_D: Vectors, near: list[Hit], text: str, k: int, weight: float, where: Mapping[str, Any] | None
    ) -> list[Hit]:
        scores_N = self.bm25.scores(text)
        unit = weight / (float(scores_N.max(initial=0.0)) or 1.0)
        ranked = {hit: hit.score + unit * self.bm25.of(hit.id, scores_N) for hit in near}
        if len(near) >= max(k, POOL):  # else there are no others
            # what is not near scores less than what is: most that share some words can't come so high
            least, known = sorted(ranked.values())[-k] - near[-1].score, {hit.id for hit in near}
            others = [id for id in self.bm25.best(scores_N, POOL) if id not in known]
            others = [id for id in others if unit * self.bm25.of(id, scores_N) > least]
            for id, vector_D in self._there(others, where):
                score = float(np.dot(query_D, vector_D))
                ranked[Hit(id, score)] = score + unit * self.bm25.of(id, scores_N)
        return sorted(ranked, key=lambda hit: -ranked[hit])[:k]

    def _there(self, ids: list[str], where: Mapping[str, Any] | None) -> list[tuple[str, Vectors]]:
        """Those that have these values, with their vectors; without one that somebody removed since BM25 was made."""
        wanted = set(meta_keys(where or {}))
        try:
            if wanted:
                ids = [id for id, p in zip(ids, self.get(ids), strict=True) if wanted <= set(meta_keys(p.meta))]
            return list(zip(ids, self.vectors(ids), strict=True))
        except KeyError as e:
            return self._there([id for id in ids if id != e.args[0]], where)

    def add(self, passages: Sequence[Passage], vectors_PD: Vectors) -> None:
        """See `Index.add`."""
        gone = self._with_parts([passage.id for passage in passages])
        super().add(passages, vectors_PD)
        self._recount(gone, passages)

    def remove(self, ids: Sequence[str]) -> int:
        """See `Index.remove`."""
        gone = self._with_parts(ids)
        removed = super().remove(ids)
        self._recount(gone, [])
        return removed

    def _with_parts(self, ids: Sequence[str]) -> list[str]:
        return [] if self._bm25 is None else [one for id in ids for one in (id, *parts_of(self._index, id))]

    def _recount(self, gone: Sequence[str], new: Sequence[Passage]) -> None:
        """Lets BM25 follow a change; it is made anew if it has outgrown what it was made of, or others changed more."""
        if self._bm25 is not None:
            self._bm25.remove(gone)
            self._bm25.add(new)
            if self._bm25.outgrown or len(self._bm25) != len(self._index):
                self._bm25 = None
