"""What every index does, and what it is handed.

Shapes here and in the whole package: N passages stored, P passages handed over, Q queries, K hits asked for, D size of
a vector.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cosup.config import UserError
from cosup.data import Passage

Vectors = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class PassageTooLargeError(UserError):
    """A passage does not fit into what the index stores; its message holds no more than the passage's id and size."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage found, and how near it is: the inner product of query and vector."""

    id: str
    score: float


class Index(Protocol):
    """Passages with a vector each, searched by vector.

    Attributes:
        fingerprint: of the embedder that made the vectors.
        dim: D, size of a vector.
    """

    fingerprint: str
    dim: int

    def __len__(self) -> int:
        """How many passages it holds."""
        ...

    def __iter__(self) -> Iterator[Passage]:
        """All passages."""
        ...

    def search(self, queries_QD: Vectors, k: int, *, where: Mapping[str, Any] | None = None) -> list[list[Hit]]:
        """The k nearest passages of each query, best first; fewer where there are fewer.

        Args:
            queries_QD: float32 [Q, D].
            k: how many.
            where: values that `meta` must have, equal as JSON.
        """
        ...

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in this order. Raises KeyError for an id that is not there."""
        ...

    def vectors(self, ids: Sequence[str]) -> Vectors:
        """The vectors [P, D] of these passages, in this order. Raises KeyError for an id that is not there."""
        ...

    def add(self, passages: Sequence[Passage], vectors_PD: Vectors) -> None:
        """Adds passages; one whose id is there already is replaced. Visible to readers only when complete.

        Raises:
            PassageTooLargeError: one does not fit; none is added.
        """
        ...

    def remove(self, ids: Sequence[str]) -> int:
        """Removes passages. Returns how many there were."""
        ...


class WrappedIndex:
    """An index that hands on to another one whatever a subclass does not do otherwise. See `Index` for the methods.

    Args:
        index: what it wraps.
    """

    def __init__(self, index: Index):
        self._index = index
        self.fingerprint, self.dim = index.fingerprint, index.dim

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._index)

    def search(self, queries_QD: Vectors, k: int, *, where: Mapping[str, Any] | None = None) -> list[list[Hit]]:
        """See `Index.search`."""
        return self._index.search(queries_QD, k, where=where)

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


class Embedder(Protocol):
    """What turns passages into vectors; `cosup.CoSupModel` is one."""

    @property
    def fingerprint(self) -> str:
        """Of all that a vector depends on."""
        ...

    @property
    def dim(self) -> int:
        """D, size of a vector."""
        ...

    def embed_passages(self, passages: Sequence[Passage]) -> Vectors:
        """Vectors [P, D], in order."""
        ...


@runtime_checkable
class MeasuringEmbedder(Embedder, Protocol):
    """An embedder that knows how long a passage is, so that those too long can be split and not shortened."""

    @property
    def max_tokens(self) -> int:
        """The most tokens that it reads of a passage."""
        ...

    @property
    def layout(self) -> dict[str, str]:
        """What it does with a passage, in words, for the sentence that refuses another one: template, metric."""
        ...

    def count_tokens(self, passages: Sequence[Passage]) -> list[int]:
        """How many tokens each passage has."""
        ...


EmbedderFactory = Callable[[int], Embedder]
"""Makes the embedder of the worker with this number; picklable, so that worker processes can be handed it."""
