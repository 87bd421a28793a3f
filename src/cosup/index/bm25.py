"""BM25 over the same passages: the baseline beside the model, and the words' part in a hybrid search."""

import json
import logging
import math
import sys
from array import array
from collections import Counter, defaultdict
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


_PASSAGES = "passages.json"


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
        lengths = [len(ids) for ids in tokens.ids]
        self._start([passage.id for passage in passages], sum(lengths) / max(len(lengths), 1))

    def _start(self, ids: list[str], mean_length: float) -> None:
        self._ids, self._rows, self._mean_length = ids, {id: row for row, id in enumerate(ids)}, mean_length
        self._made_of = len(ids)
        self._gone = array("q")
        self._added: defaultdict[str, tuple[array[int], array[float]]]  # of a word: rows, and what they score by it
        self._added = defaultdict(lambda: (array("q"), array("f")))

    def __len__(self) -> int:
        """How many passages it ranks."""
        return len(self._rows)

    @property
    def outgrown(self) -> bool:
        """Whether more was added than it was made of, so that its figures of the corpus may be far off."""
        return len(self._ids) > 2 * self._made_of

    def add(self, passages: Sequence[Passage]) -> None:
        """Counts passages in, each in the place of the one that has its id.

        How rare a word is, and how long a passage, stays what it was when this was made: that costs nothing for the
        others, and is as near to the truth as few were added.
        """
        for passage in passages:
            self.remove([passage.id])
            row = self._rows[passage.id] = len(self._ids)
            self._ids.append(passage.id)
            words = _words(f"{passage.title} {passage.text}")
            k1, b = self._retriever.k1, self._retriever.b
            saturation = k1 * (1 - b + b * len(words) / (self._mean_length or 1.0))
            for word, count in Counter(words).items():
                rows, scores = self._added[word]
                rows.append(row)
                scores.append(self._rarity(word) * count / (count + saturation))

    def remove(self, ids: Sequence[str]) -> None:
        """Leaves passages out from now on; ids that are not there are passed over."""
        self._gone.extend(self._rows.pop(id) for id in ids if id in self._rows)

    def _rarity(self, word: str) -> float:
        """The inverse document frequency, of the passages that this was made of."""
        column, having = None if self._empty else self._retriever.vocab_dict.get(word), 0
        if column is not None:
            start, end = self._retriever.scores["indptr"][column : column + 2]
            having = int(end - start)
        return math.log(1 + (self._made_of - having + 0.5) / (having + 0.5))

    def save(self, folder: Path) -> None:
        """Writes it, as it was made, into a folder that is there: arrays and JSON.

        Raises:
            ValueError: the corpus has no word, or was changed.
        """
        if self._empty or self._gone or len(self._ids) > self._made_of:
            raise ValueError("only BM25 of some words, and as it was made, is saved")
        self._retriever.save(folder, show_progress=False, raise_on_serialization_error=True)
        kept = {"ids": self._ids, "mean_length": self._mean_length}
        (folder / _PASSAGES).write_text(json.dumps(kept), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote."""
        found = cls([])
        found._retriever, found._empty = bm25s.BM25.load(folder, show_progress=False), False
        kept = json.loads((folder / _PASSAGES).read_text("utf-8"))
        found._start(kept["ids"], kept["mean_length"])
        return found

    def search(self, queries: Sequence[str], k: int) -> list[list[str]]:
        """Ids of the k best passages of each query, best first; none that shares no word with it."""
        return [self.best(self.scores(query), k) for query in queries]

    def scores(self, query: str) -> Vectors:
        """The score of every passage, float32 [N], in an order of its own; 0 where it shares no word, or has gone."""
        scores_N = np.zeros(len(self._ids), np.float32)
        words = _words(query)
        if words and not self._empty:
            scores_N[: self._made_of] = self._retriever.get_scores(words)
        for rows, scores in (self._added[word] for word in words if word in self._added):
            scores_N[np.frombuffer(rows, np.int64)] += np.frombuffer(scores, np.float32)
        scores_N[np.array(self._gone, np.int64)] = 0
        return scores_N

    def best(self, scores_N: Vectors, k: int) -> list[str]:
        """Ids of the k passages that score best, best first, equal ones in their order; none that scores 0."""
        rows = np.flatnonzero(scores_N)
        if k < len(rows):
            rows = rows[scores_N[rows] >= -np.partition(-scores_N[rows], k - 1)[k - 1]]
        return [self._ids[row] for row in rows[np.argsort(-scores_N[rows], kind="stable")][:k]]

    def of(self, id: str, scores_N: Vectors) -> float:
        """The score of one passage; 0 for one that is not in the corpus."""
        row = self._rows.get(id)
        return 0.0 if row is None else float(scores_N[row])


def _words(text: str) -> list[str]:
    (words,) = bm25s.tokenize([text], stopwords="en", return_ids=False, show_progress=False)
    return list(words)


def _tokens(texts: list[str]) -> bm25s.tokenization.Tokenized:
    return bm25s.tokenize(texts, stopwords="en", show_progress=False)
