"""BM25 over the same passages: the baseline that evaluations show beside the model."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cosup.data import Passage


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


class BM25:
    """Okapi BM25 over title and text, lower-cased, English stop words left out.

    Args:
        passages: the corpus.

    Source:
        bm25s (Lù 2024), its default Lucene variant, k1 1.5, b 0.75.
    """

    def __init__(self, passages: Sequence[Passage]):
        self._ids = [passage.id for passage in passages]
        self._retriever = bm25s.BM25()
        tokens = _tokens([f"{p.title} {p.text}" for p in passages])
        self._empty = not tokens.vocab or not any(tokens.ids)
        if not self._empty:
            self._retriever.index(tokens, show_progress=False)

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


def _tokens(texts: list[str]) -> bm25s.tokenization.Tokenized:
    return bm25s.tokenize(texts, stopwords="en", show_progress=False)
