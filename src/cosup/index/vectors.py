"""Vectors on disk, as fp32, fp16 or int8, and exact scores against them.

int8: each vector is scaled so that its largest component is 127; the scales lie in a file of their own.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

from cosup.files import atomic_file
from cosup.index.manifest import Dtype, damaged
from cosup.index.mapped import MappedFile
from cosup.index.protocol import Rows, Vectors

_BLOCK = 1 << 16  # rows copied at a time
_DECODED = 1 << 9  # rows decoded at a time: what stays in a core's cache
_PRODUCTS = 1 << 24  # scores in memory at a time: 64 MiB
_QUERIES = 256  # multiplied at a time
_FEW = 12  # queries: for fewer, the product turned round is up to four times as quick
_MARGIN = 16  # candidates scored exactly beyond those asked for
_VERIFIED = 64 << 20  # bytes: reading so many takes less than a tenth of a second; more would delay the opening
Stored = npt.NDArray[Any]


def encode(vectors_PD: Vectors, dtype: Dtype) -> tuple[Stored, Vectors | None]:
    """Vectors as they are stored, and for int8 the scale of each."""
    if dtype != "int8":
        return vectors_PD.astype(dtype, copy=False), None
    scales_P = np.abs(vectors_PD).max(axis=1, initial=0).astype(np.float32) / 127
    safe_P = np.where(scales_P == 0, 1, scales_P)
    return np.rint(vectors_PD / safe_P[:, None]).astype(np.int8), scales_P


def decode(stored_PD: Stored, scales_P: Vectors | None) -> Vectors:
    """The inverse of `encode`, as far as the type allows: float32 [P, D]."""
    vectors_PD: Vectors = stored_PD.astype(np.float32, copy=False)
    return vectors_PD if scales_P is None else vectors_PD * scales_P[:, None]


def write_array(path: Path, blocks: Iterable[Stored], *, count: int) -> None:
    """Writes blocks of rows, [P, D] or [P], as one `.npy` file of `count` rows without holding them all."""
    stream = iter(blocks)
    first = next(stream)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *first.shape[1:])})
        written = 0
        for block in _chain(first, stream):
            file.write(np.ascontiguousarray(block).data)
            written += len(block)
    assert written == count


def _chain(first: Stored, rest: Iterator[Stored]) -> Iterator[Stored]:
    yield first
    yield from rest


class VectorFile:
    """The vectors of a segment, mapped.

    Args:
        file: the `.npy` file.
        scales: of int8 vectors.
        shape: what [N, D] must be.

    Raises:
        UserError: it is another array than the manifest says, or one of at most 64 MiB has a byte that was not written.
    """

    def __init__(self, file: MappedFile, scales: MappedFile | None, *, shape: tuple[int, int]):
        for part in (file, scales):
            if part is not None and part.entry.bytes <= _VERIFIED:
                part.verify()
        self._stored_ND = file.array()
        self._scales_N = None if scales is None else scales.array()
        if self._stored_ND.shape != shape or (self._scales_N is not None and self._scales_N.shape != shape[:1]):
            raise damaged(file.path)

    def __len__(self) -> int:
        return len(self._stored_ND)

    def rows(self, rows_P: Rows) -> Vectors:
        """The vectors [P, D] of some rows."""
        return decode(self._stored_ND[rows_P], None if self._scales_N is None else self._scales_N[rows_P])

    def stored(self, rows_P: Rows) -> tuple[Stored, Vectors | None]:
        """Some rows as they are stored, and for int8 their scales."""
        return self._stored_ND[rows_P], None if self._scales_N is None else self._scales_N[rows_P]

    def blocks(self, rows_P: Rows | None = None) -> Iterator[tuple[Rows, Vectors]]:
        """All vectors, or those of some rows, a block at a time, with their rows; all in fp32 are not copied."""
        for start, stored_PD, scales_P in self._stored_blocks(rows_P, _BLOCK):
            rows = np.arange(start, start + len(stored_PD))
            yield rows if rows_P is None else rows_P[rows], decode(stored_PD, scales_P)

    def _stored_blocks(self, rows_P: Rows | None, block: int) -> Iterator[tuple[int, Stored, Vectors | None]]:
        """All vectors, or those of some rows, as they are stored, with the place of each block among them."""
        for start in range(0, len(self) if rows_P is None else len(rows_P), block):
            part = slice(start, start + block)
            if rows_P is not None:
                yield start, *self.stored(rows_P[part])
            else:
                yield start, self._stored_ND[part], None if self._scales_N is None else self._scales_N[part]

    def nearest(self, queries_QD: Vectors, k: int, rows_P: Rows | None = None) -> tuple[Vectors, Rows]:
        """The k best rows of each query, exactly.

        Args:
            queries_QD: float32 [Q, D], contiguous.
            k: how many.
            rows_P: search only these.

        Returns:
            Scores and rows, each [Q, min(k, rows)], best first.
        """
        scores_QK = np.empty((len(queries_QD), 0), np.float32)
        found_QK = np.empty((len(queries_QD), 0), np.int64)
        block = max(_PRODUCTS // max(len(queries_QD), 1), _BLOCK) if rows_P is None else _BLOCK
        for start, stored_PD, scales_P in self._stored_blocks(rows_P, block):
            scores, places = _candidates(queries_QD, stored_PD, scales_P, k)
            rows = start + places if rows_P is None else rows_P[start + places]
            scores_QK, found_QK = best(np.hstack([scores_QK, scores]), np.hstack([found_QK, rows]), k)
        return scores_QK, found_QK


def _candidates(queries_QD: Vectors, stored_PD: Stored, scales_P: Vectors | None, k: int) -> tuple[Vectors, Rows]:
    """The k best vectors of each query, in any order, with exact scores, and a few more.

    One product for all queries reads the vectors once, in a third to a sixth of the time of FAISS's loop over queries;
    for a single one that loop is quicker. How either rounds depends on the number of queries, so it only proposes.
    """
    wanted = min(k + _MARGIN, len(stored_PD))
    if len(queries_QD) == 1 and stored_PD.dtype == np.float32:
        _, places_QC = faiss.knn(queries_QD, stored_PD, wanted, faiss.METRIC_INNER_PRODUCT)
    else:
        starts = range(0, len(queries_QD), _QUERIES)
        parts = (_products(queries_QD[i : i + _QUERIES], stored_PD, scales_P) for i in starts)
        places_QC = torch.cat([each.topk(wanted, sorted=False).indices for each in parts]).numpy()
    scores_QC = [
        scores_of(decode(stored_PD[places], None if scales_P is None else scales_P[places]), query)
        for places, query in zip(places_QC, queries_QD, strict=True)
    ]
    return np.stack(scores_QC), places_QC


def _products(queries_QD: Vectors, stored_PD: Stored, scales_P: Vectors | None) -> torch.Tensor:
    """Inner products [Q, P]; what is not stored as float32 is decoded a little at a time."""
    queries, stored = from_dlpack(queries_QD), from_dlpack(stored_PD)
    if stored.dtype == torch.float32:
        return (stored @ queries.T).T if len(queries) < _FEW else queries @ stored.T
    products = torch.cat([queries @ some.float().T for some in stored.split(_DECODED)], 1)
    return products if scales_P is None else products.mul_(from_dlpack(scales_P))


def scores_of(vectors_PD: Vectors, query_D: Vectors) -> Vectors:
    """Inner products [P] with one query, each the same whatever else is scored beside it."""
    scores_P: Vectors = np.einsum("pd,d->p", vectors_PD, query_D)
    return scores_P


def best(scores_QK: Vectors, rows_QK: Rows, k: int) -> tuple[Vectors, Rows]:
    """The k best columns of each row, best first; equal scores by row number."""
    order = np.lexsort((rows_QK, -scores_QK), axis=1)[:, :k]
    return np.take_along_axis(scores_QK, order, 1), np.take_along_axis(rows_QK, order, 1)
