"""BM25 over the same passages: the baseline beside the model, and the words' part in a hybrid search."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np

from cosup.data import Passage
from cosup.index.protocol import Vectors


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Lets an import in here fail."""
    before = {package: sys.modules[package]} if package in sys.modules else {}
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(before)


with _hidden("jax"):  # where it is installed, bm25s would start it, and it takes most of a GPU's memory for itself
    import bm25s

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG for itself


_IDS = "ids.json"


class BM25:
    """Okapi BM25 over title and text, lower-cased, English stop words left out.

    Args:
        passages: the corpus.

    Source:
        bm25s (Lù 2024), its default Lucene variant, k1 1.5, b 0.75.
    """

    def __init__(self, passages: Sequence[Passage]):
        tokens = _tokens([f"{p.title} {p.text}" for p in passages])
        self._retriever = bm25s.BM25()
        self._empty = not tokens.vocab or not any(tokens.ids)
        if not self._empty:
            self._retriever.index(tokens, show_progress=False)
        self._name([passage.id for passage in passages])

    def _name(self, ids: list[str]) -> None:
        self._ids, self._rows = ids, {id: row for row, id in enumerate(ids)}

    def save(self, folder: Path) -> None:
        """Writes it into a folder that is there: arrays and JSON. Raises ValueError if the corpus has no word."""
        if self._empty:
            raise ValueError("there is no word to save")
        self._retriever.save(folder, show_progress=False, raise_on_serialization_error=True)
        (folder / _IDS).write_text(json.dumps(self._ids), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote."""
        found = cls([])
        found._retriever, found._empty = bm25s.BM25.load(folder, show_progress=False), False
        found._name(json.loads((folder / _IDS).read_text("utf-8")))
        return found

    def search(self, queries: Sequence[str], k: int) -> list[list[str]]:
        """Ids of the k best passages of each query, best first; none that shares no word with it."""
        if not queries or self._empty:
            return [[] for _ in queries]
        k = min(k, len(self._ids))
        rows_QK, scores_QK = self._retriever.retrieve(_tokens(list(queries)), k=k, show_progress=False)
        return [
            [self._ids[int(row)] for row, score in zip(rows, scores, strict=True) if score > 0]
            for rows, scores in zip(rows_QK, scores_QK, strict=True)
        ]

    def scores(self, query: str) -> Vectors:
        """The score of every passage, float32 [N], in the order of the corpus; 0 where it shares no word."""
        (tokens,) = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)
        if self._empty or not tokens:
            return np.zeros(len(self._ids), np.float32)
        scores_N: Vectors = self._retriever.get_scores(tokens)
        return scores_N

    def best(self, scores_N: Vectors, k: int) -> list[str]:
        """Ids of the k passages that score best, best first; none that scores 0."""
        rows = np.argpartition(-scores_N, k - 1)[:k] if k < len(scores_N) else np.arange(len(scores_N))
        return [self._ids[row] for row in rows[np.argsort(-scores_N[rows], kind="stable")] if scores_N[row] > 0]

    def of(self, id: str, scores_N: Vectors) -> float:
        """The score of one passage; 0 for one that is not in the corpus."""
        row = self._rows.get(id)
        return 0.0 if row is None else float(scores_N[row])


def _tokens(texts: list[str]) -> bm25s.tokenization.Tokenized:
    return bm25s.tokenize(texts, stopwords="en", show_progress=False)
