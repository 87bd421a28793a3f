"""Searching by the state and by words at once: the inner product, and something more for words in common."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

from cosup.config import UserError
from cosup.data import Passage
from cosup.index.bm25 import BM25
from cosup.index.kept import bm25_of, generation_of
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
        depth = max(k, POOL)
        if len(near) >= depth:  # else there are no others
            # what is not near scores less than what is: most that share some words can't come so high
            least, known = sorted(ranked.values())[-k] - near[-1].score, {hit.id for hit in near}
            found = self.bm25.best(scores_N, len(scores_N) if where else depth)
            others = [id for id in found if id not in known and unit * self.bm25.of(id, scores_N) > least]
            for id, vector_D in islice(self._there(others, where), depth):
                score = float(np.dot(query_D, vector_D))
                ranked[Hit(id, score)] = score + unit * self.bm25.of(id, scores_N)
        return sorted(ranked, key=lambda hit: -ranked[hit])[:k]

    def _there(self, ids: list[str], where: Mapping[str, Any] | None) -> Iterator[tuple[str, Vectors]]:
        """Those that have these values, with their vectors; without one that somebody removed since BM25 was made."""
        wanted = set(meta_keys(where or {}))
        for start in range(0, len(ids), POOL):
            yield from self._known(ids[start : start + POOL], wanted)

    def _known(self, ids: list[str], wanted: set[int]) -> list[tuple[str, Vectors]]:
        try:
            if wanted:
                ids = [id for id, p in zip(ids, self.get(ids), strict=True) if wanted <= set(meta_keys(p.meta))]
            return list(zip(ids, self.vectors(ids), strict=True))
        except KeyError as e:
            return self._known([id for id in ids if id != e.args[0]], wanted)

    def add(self, passages: Sequence[Passage], vectors_PD: Vectors) -> None:
        """See `Index.add`."""
        with self._recounting([passage.id for passage in passages], passages):
            super().add(passages, vectors_PD)

    def remove(self, ids: Sequence[str]) -> int:
        """See `Index.remove`."""
        with self._recounting(ids, []):
            return super().remove(ids)

    @contextmanager
    def _recounting(self, gone: Sequence[str], new: Sequence[Passage]) -> Iterator[None]:
        """Lets BM25 follow a change; it is made anew if it has outgrown what it was made of, or others changed more."""
        if self._bm25 is None:
            yield
            return
        before = generation_of(self._index)
        whole = [one for id in gone for one in (id, *parts_of(self._index, id))]
        yield
        self._bm25.remove(whole)
        self._bm25.add(new)
        others = generation_of(self._index) > before + 1
        if others or self._bm25.outgrown or len(self._bm25) != len(self._index):
            self._bm25 = None
