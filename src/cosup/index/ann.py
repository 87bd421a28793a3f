"""Approximate search by FAISS: which structure, how it is built, and how hard it looks.

Whatever FAISS proposes is scored again with the stored vectors, so that a score means the same for every kind.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np

from cosup.config import UserError
from cosup.files import explained
from cosup.index.mapped import MappedFile
from cosup.index.protocol import Rows, Vectors
from cosup.index.vectors import VectorFile, scores_of

faiss: Any = _faiss  # its stubs lack half of what is used here

log = logging.getLogger(__name__)

KINDS = ("auto", "flat", "hnsw", "ivf-pq")
AUTO_FLAT = 100_000
"""Up to here `auto` is exact: a search takes some ten milliseconds, less than writing one token."""
PROMISED = 0.95  # recall@10
_RECALL = 0.97  # what the effort is chosen for
_SAMPLE = 128  # stored vectors that it is measured with
_EFFORTS = (8, 16, 32, 64, 128, 256, 512, 1024)
_OVERSAMPLING = 16  # candidates scored again for each passage asked for, at least
_CANDIDATES = (160, 640, 2560)  # scored again, at least, whatever is asked for
_WORTH = 0.01  # of recall, that twice the effort must gain


def choose(kind: str, count: int) -> str:
    """What `auto` stands for, said in the log; any other kind as it is."""
    if kind != "auto":
        return kind
    chosen = "flat" if count <= AUTO_FLAT else "ivf-pq"
    why = "exact search" if chosen == "flat" else "approximate search"
    log.info("kind auto: %s (%s) for %s passages", chosen, why, f"{count:,}")
    return chosen


def factory_of(kind: str, count: int, dim: int) -> str:
    """The FAISS factory string of a kind for so many vectors [count, dim]; any other string is one already."""
    if kind == "hnsw":
        return "HNSW32_SQ8"
    if kind != "ivf-pq":
        return kind
    if count < 256:
        raise UserError(f"kind 'ivf-pq' is trained on at least 256 passages, and there are {count:,}; use 'flat'")
    lists = 1 << max(0, round(float(np.log2(4 * np.sqrt(count)))))
    while lists > 1 and count < 39 * lists:
        lists //= 2
    parts = next(m for m in range(max(dim // 8, 1), 0, -1) if dim % m == 0)
    return f"IVF{lists},PQ{parts}"


def build(path: Path, vectors: VectorFile, dim: int, *, kind: str, graph_threads: int = 1) -> None:
    """Trains a FAISS index on an even sample of the vectors, adds all, and writes it.

    Args:
        path: the file to write.
        vectors: all of them.
        dim: D.
        kind: `hnsw`, `ivf-pq`, or a factory string.
        graph_threads: how many add to an HNSW graph; with more than one, two builds differ.

    Raises:
        UserError: FAISS refuses the factory string or the vectors.
    """
    index = _made(kind, len(vectors), dim)
    _quiet(index)
    try:
        if not index.is_trained:
            index.train(vectors.rows(_even_rows(len(vectors), _training_size(index))))
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(graph_threads if _hnsw(index) is not None else threads)
        try:
            for _, block in vectors.blocks():
                index.add(block)
        finally:
            faiss.omp_set_num_threads(threads)
    except RuntimeError as e:
        raise UserError(
            f"FAISS can't build an index of kind {kind!r} from {len(vectors):,} vectors of {dim} ({_reason(e)}); "
            f"{_ADVICE}"
        ) from None
    with explained(path):
        faiss.write_index(index, str(path))


def refuse_unknown(kind: str, dim: int) -> None:
    """Raises UserError if a kind is none that FAISS can make for vectors of this dimension."""
    if kind not in KINDS:
        _made(kind, 0, dim)


def _made(kind: str, count: int, dim: int) -> Any:
    try:
        return faiss.index_factory(dim, factory_of(kind, count, dim), faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as e:
        raise UserError(f"FAISS knows no kind {kind!r} for vectors of {dim} ({_reason(e)}); {_ADVICE}") from None


_ADVICE = f"use {', '.join(KINDS)} or a factory string such as 'IVF1024,SQ8'"


def _reason(error: RuntimeError) -> str:
    """What FAISS says, without where in its source it says so."""
    return re.sub(r".*(Error: |\.(cpp|h):\d+: )", "", str(error).strip().splitlines()[-1])


class AnnFile:
    """A FAISS file, mapped; verified and read when it is first searched.

    Args:
        file: written by `build`.
        vectors: those it was built from.
    """

    def __init__(self, file: MappedFile, vectors: VectorFile):
        self._file, self._vectors = file, vectors
        self._index: Any = None

    def nearest(
        self, queries_QD: Vectors, k: int, effort: int, candidates: int, rows_P: Rows | None = None
    ) -> tuple[Vectors, Rows] | None:
        """The k best rows of each query among those that FAISS proposes, with exact scores.

        Args:
            queries_QD: float32 [Q, D], contiguous.
            k: how many.
            effort: lists probed, or nodes kept in view.
            candidates: how many are scored again at least.
            rows_P: search only these.

        Returns:
            Scores and rows [Q, k]; rows are -1 where there are fewer. None if this structure can't be restricted.
        """
        index = self._open()
        parameters = _parameters(index, effort, rows_P, len(self._vectors))
        if parameters is None:
            return None
        wanted = min(max(k * _OVERSAMPLING, candidates), len(self._vectors))
        _, rows_QC = index.search(queries_QD, wanted, params=parameters or None)
        scores_QC = np.full(rows_QC.shape, -np.inf, np.float32)
        for query, rows, scores in zip(queries_QD, rows_QC, scores_QC, strict=True):
            there = rows >= 0
            scores[there] = scores_of(self._vectors.rows(rows[there]), query)
        order = np.argsort(-scores_QC, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores_QC, order, 1), np.take_along_axis(rows_QC, order, 1)

    def _open(self) -> Any:
        if self._index is None:
            self._file.verify()
            data = np.frombuffer(self._file.bytes, np.uint8)
            reader = faiss.ZeroCopyIOReader(faiss.swig_ptr(data), data.size)
            self._index = faiss.read_index(reader, faiss.IO_FLAG_MMAP_IFC)
        return self._index

    def calibrate(self) -> tuple[int, int, float]:
        """The least that finds 97 % of the ten nearest of a sample of the vectors themselves.

        More candidates are tried where more effort gains nothing: among many vectors about equally near, compressed
        ones can't tell which are the nearest.

        Returns:
            Effort, candidates and the recall reached, which is the best where none is enough.
        """
        queries_QD = self._vectors.rows(_even_rows(len(self._vectors), _SAMPLE))
        _, exact_QK = self._vectors.nearest(queries_QD, 10)
        best = (0, 0, -1.0)
        for candidates in _CANDIDATES:
            before = -1.0
            for effort in _EFFORTS:
                result = self.nearest(queries_QD, 10, effort, candidates)
                assert result is not None
                recall = recall_of(result[1], exact_QK)
                best = max(best, (effort, candidates, recall), key=lambda tried: tried[2])
                if recall >= _RECALL:
                    return best
                if recall < before + _WORTH:
                    break
                before = recall
        return best


def recall_of(found_QK: Rows, exact_QK: Rows) -> float:
    """The share of the exact rows that were found."""
    shared = sum(len(np.intersect1d(found, exact)) for found, exact in zip(found_QK, exact_QK, strict=True))
    return shared / max(exact_QK.size, 1)


def _parameters(index: Any, effort: int, rows_P: Rows | None, count: int) -> Any:
    """FAISS's search parameters; an empty mapping where it has none to set, None where rows can't be chosen."""
    chosen: Mapping[str, Any] = {} if rows_P is None else {"sel": _selector(rows_P, count)}
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=effort, **chosen)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=max(effort, 16), **chosen)
    if chosen:
        return None
    if faiss.try_extract_index_ivf(index) is not None:
        faiss.extract_index_ivf(index).nprobe = effort
    return chosen


def _selector(rows_P: Rows, count: int) -> Any:
    bits = np.zeros(count, bool)
    bits[rows_P] = True
    return faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))


def _hnsw(index: Any) -> Any:
    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return inner if isinstance(inner, faiss.IndexHNSW) else None


def _quiet(index: Any) -> None:
    """Without what costs much and gains little, and without advice on standard error.

    That is: ten rounds of k-means in place of 25, and no polysemous codes, which nothing here uses (on 10,000 vectors
    of 64 dimensions they took 16 of 17 seconds).
    """
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None:
        return
    ivf = faiss.downcast_index(ivf)
    if hasattr(ivf, "do_polysemous_training"):
        ivf.do_polysemous_training = False
    for clustering in (ivf.cp, *([ivf.pq.cp] if hasattr(ivf, "pq") else [])):
        clustering.niter, clustering.min_points_per_centroid = 10, 1


def _training_size(index: Any) -> int:
    ivf = faiss.try_extract_index_ivf(index)
    return 20_000 if ivf is None else max(20_000, 40 * int(ivf.nlist))


def _even_rows(count: int, wanted: int) -> Rows:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))
