"""How sure a figure is: bootstrap intervals, and whether two runs differ.

Shapes: Q questions, M metrics, S seeds, R resamples.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

_RESAMPLES = 1000
_CHUNK = 100  # resamples drawn at once


def bootstrap_intervals(values_QM: Values, *, resamples: int = _RESAMPLES, seed: int = 0) -> Values:
    """95 % intervals of the means of several metrics, by resampling questions.

    Args:
        values_QM: float64; NaN where a question has no value for a metric.
        resamples: how often.
        seed: of the drawing.

    Returns:
        float64 [M, 2], the 2.5th and the 97.5th percentile of the resampled means; NaN where no question has a value.

    Source:
        Efron's percentile bootstrap.
    """
    questions = len(values_QM)
    if not questions:
        return np.full((values_QM.shape[1], 2), np.nan)
    known_QM = ~np.isnan(values_QM)
    filled_QM = np.where(known_QM, values_QM, 0.0)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _CHUNK):
        count = min(_CHUNK, resamples - start)
        drawn_RQ = np.stack(
            [np.bincount(row, minlength=questions) for row in rng.integers(questions, size=(count, questions))]
        ).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append((drawn_RQ @ filled_QM) / (drawn_RQ @ known_QM.astype(np.float64)))
    means_RM = np.concatenate(means)
    bounds_M2 = np.full((values_QM.shape[1], 2), np.nan)
    for metric in np.flatnonzero(known_QM.any(axis=0)):
        bounds_M2[metric] = np.nanpercentile(means_RM[:, metric], [2.5, 97.5])
    return bounds_M2


def bootstrap_reduction(
    whole_Q: Values, part_Q: Values, *, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of 1 - mean(part) / mean(whole), both resampled with the same questions.

    Args:
        whole_Q, part_Q: float64, of the same questions.
        resamples: how often; draws in which the whole is 0 are left out.
        seed: of the drawing.

    Returns:
        The 2.5th and the 97.5th percentile; NaN where every draw of the whole is 0.
    """
    questions = len(whole_Q)
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(resamples if questions else 0):
        rows = rng.integers(questions, size=questions)
        if whole := whole_Q[rows].sum():
            rates.append(1.0 - part_Q[rows].sum() / whole)
    low, high = np.percentile(rates, [2.5, 97.5]) if rates else (np.nan, np.nan)
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two conditions on the same questions.

    Args:
        value: mean of the second less mean of the first.
        low, high: 95 % interval over questions and seeds.
        p: two-sided, that a difference as large comes from chance.
        questions: how many were compared.
        seeds: of the first and of the second.
    """

    value: float
    low: float
    high: float
    p: float
    questions: int
    seeds: tuple[int, int]


def paired_difference(first_SQ: Values, second_SQ: Values, *, resamples: int = _RESAMPLES, seed: int = 0) -> Difference:
    """Compares two conditions, each run with one or several seeds, question by question.

    The interval resamples questions, and within each draw the seeds of either condition. The test flips the sign of
    each question's difference, seeds averaged, at random: what it says holds for these seeds.

    Args:
        first_SQ, second_SQ: float64, the same Q questions in the same order; the numbers of seeds may differ.
        resamples: of the interval, and ten times as many flips of the test.
        seed: of the drawing.

    Raises:
        ValueError: no question, or different numbers of them.

    Source:
        Paired bootstrap (Efron and Tibshirani 1993); paired randomisation test (Noreen 1989), with Monte Carlo
        p-value (b + 1) / (n + 1).
    """
    if first_SQ.shape[1] != second_SQ.shape[1] or not first_SQ.shape[1]:
        raise ValueError(f"the questions differ: {first_SQ.shape[1]} and {second_SQ.shape[1]}")
    questions = first_SQ.shape[1]
    difference_Q = second_SQ.mean(axis=0) - first_SQ.mean(axis=0)
    value = float(difference_Q.mean())
    rng = np.random.default_rng(seed)
    draws = [_resample(first_SQ, second_SQ, rng) for _ in range(resamples)]
    low, high = np.percentile(draws, [2.5, 97.5])
    flips = 10 * resamples
    as_large = 0
    for start in range(0, flips, 10 * _CHUNK):
        count = min(10 * _CHUNK, flips - start)
        signs_RQ = rng.integers(0, 2, size=(count, questions), dtype=np.int8) * 2.0 - 1.0
        as_large += int((np.abs(signs_RQ @ difference_Q) / questions >= abs(value) - 1e-12).sum())
    p = (as_large + 1) / (flips + 1)
    return Difference(value, float(low), float(high), p, questions, (len(first_SQ), len(second_SQ)))


def _resample(first_SQ: Values, second_SQ: Values, rng: np.random.Generator) -> float:
    questions = rng.integers(first_SQ.shape[1], size=first_SQ.shape[1])
    means = [x[rng.integers(len(x), size=len(x))][:, questions].mean() for x in (first_SQ, second_SQ)]
    return float(means[1] - means[0])
