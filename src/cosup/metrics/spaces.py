"""What a space of vectors is like, and how it moves. Pure functions of arrays.

Shapes: N vectors of size D, Q queries, k neighbours. Vectors are compared after scaling to length 1.
"""

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.floating]
Rows = npt.NDArray[np.int64]


def unit(vectors_ND: Vectors) -> npt.NDArray[np.float64]:
    """The vectors scaled to length 1; one of length 0 stays."""
    vectors = np.asarray(vectors_ND, np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float64] = vectors / np.where(lengths > 0, lengths, 1.0)
    return scaled


def alignment(queries_QD: Vectors, targets_QD: Vectors) -> float:
    """Mean squared distance between each query and its own target, in [0, 4]; lower is nearer.

    Source:
        Wang and Isola, Understanding Contrastive Representation Learning (ICML 2020).
    """
    return float(((unit(queries_QD) - unit(targets_QD)) ** 2).sum(axis=1).mean())


def uniformity(vectors_ND: Vectors) -> float:
    """Log of the mean of exp(-2 d²) over pairs of different vectors, at most 0; lower is more evenly spread.

    Args:
        vectors_ND: at least two; all pairs are taken, so a few thousand are enough.

    Source:
        Wang and Isola (ICML 2020).
    """
    vectors = unit(vectors_ND)
    similar = vectors @ vectors.T
    pairs = similar[np.triu_indices(len(vectors), k=1)]
    exponents = -2.0 * (2.0 - 2.0 * pairs)
    top = exponents.max()
    return float(top + np.log(np.exp(exponents - top).mean()))


def effective_rank(vectors_ND: Vectors) -> float:
    """How many directions the vectors fill: exp of the entropy of their singular values, from 1 to min(N, D).

    The mean is taken out first, so that one direction which all share does not count.

    Source:
        Roy and Vetterli, The Effective Rank (EUSIPCO 2007).
    """
    vectors = unit(vectors_ND)
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False)
    total = values.sum()
    if total <= 0:
        return 1.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def hubness(found_QK: Rows, count: int) -> float:
    """Skewness of how often each of `count` vectors is among the k nearest of a query; 0 where all are equally often.

    Args:
        found_QK: rows of the vectors found for each query.
        count: N.

    Source:
        Radovanović et al., Hubs in Space (JMLR 2010).
    """
    times = np.bincount(found_QK.ravel(), minlength=count).astype(np.float64)
    spread = times.std()
    return float((((times - times.mean()) / spread) ** 3).mean()) if spread > 0 else 0.0


def nearest(queries_QD: Vectors, vectors_ND: Vectors, k: int) -> Rows:
    """Rows [Q, k] of the k most similar vectors of each query, best first, ties by row."""
    similar_QN = unit(queries_QD) @ unit(vectors_ND).T
    found: Rows = np.argsort(-similar_QN, axis=1, kind="stable")[:, :k]
    return found


def drift(before_ND: Vectors, after_ND: Vectors) -> float:
    """Mean cosine distance between each vector before and after, in [0, 2]; one that stays zero has not moved.

    Args:
        before_ND, after_ND: the same things in the same order.
    """
    return 0.5 * alignment(before_ND, after_ND)


def drift_up_to_rotation(before_ND: Vectors, after_ND: Vectors) -> float:
    """`drift` that remains after the rotation (or reflection) that fits best was taken out.

    Source:
        Schönemann, A generalized solution of the orthogonal Procrustes problem (1966).
    """
    before, after = unit(before_ND), unit(after_ND)
    left, _, right = np.linalg.svd(before.T @ after, full_matrices=False)
    return drift(before @ (left @ right), after)


def overlap(before_QK: Rows, after_QK: Rows) -> float:
    """The mean share of a query's k nearest that are among its k nearest after, in [0, 1]."""
    shares = [
        len(set(before.tolist()) & set(after.tolist())) / len(before)
        for before, after in zip(before_QK, after_QK, strict=True)
    ]
    return float(np.mean(shares))
