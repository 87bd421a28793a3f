"""What every index does, and what it is handed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cosup.data import Passage

Vectors = npt.NDArray[np.float32]


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
            where: values that `meta` must have.
        """
        ...

    def get(self, ids: Sequence[str]) -> list[Passage]:
        """The passages with these ids, in this order. Raises KeyError for an id that is not there."""
        ...

    def add(self, passages: Sequence[Passage], vectors_PD: Vectors) -> None:
        """Adds passages; one whose id is there already is replaced. Visible to readers only when complete."""
        ...

    def remove(self, ids: Sequence[str]) -> int:
        """Removes passages. Returns how many there were."""
        ...


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
