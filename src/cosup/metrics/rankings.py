"""Rankings against gold passages. Every score is in [0, 1]."""

from collections.abc import Collection, Iterable, Sequence


def success_at(ranked: Sequence[str], gold: Collection[str], *, k: int) -> float:
    """1.0 if any of the first k ids is gold, else 0.0.

    Args:
        ranked: ids, best first, each once; may be shorter than k, or empty.
        gold: ids that count as right; at least one.
        k: how many of the first ids are looked at, from 1.

    Returns:
        1.0 or 0.0.

    Raises:
        ValueError: no gold, or k below 1.

    Source:
        trec_eval, `success`.
    """
    return float(_hits(ranked, gold, k) > 0)


def recall_at(ranked: Sequence[str], gold: Collection[str], *, k: int) -> float:
    """The share of the gold ids that are among the first k; see `success_at` for arguments and errors.

    Source:
        trec_eval, `recall`.
    """
    return _hits(ranked, gold, k) / len(set(gold))


def precision_at(ranked: Sequence[str], gold: Collection[str], *, k: int) -> float:
    """The share of gold among the first k places; see `success_at` for arguments and errors.

    A ranking shorter than k is divided by k all the same.

    Source:
        trec_eval, `P`.
    """
    return _hits(ranked, gold, k) / k


def reciprocal_rank(ranked: Sequence[str], gold: Collection[str]) -> float:
    """One over the rank, from 1, of the first gold id; 0.0 where none is ranked.

    Args:
        ranked: ids, best first, each once; may be empty.
        gold: ids that count as right; at least one.

    Returns:
        A value in [0, 1].

    Raises:
        ValueError: no gold.

    Source:
        trec_eval, `recip_rank`.
    """
    right = _distinct(gold)
    return next((1.0 / rank for rank, id in enumerate(ranked, start=1) if id in right), 0.0)


def r_precision(ranked: Sequence[str], gold: Collection[str]) -> float:
    """The share of gold among the first R places, R being the number of gold ids; see `reciprocal_rank`.

    Source:
        trec_eval, `Rprec`; the retrieval metric of KILT (Petroni et al., NAACL 2021).
    """
    return precision_at(ranked, gold, k=len(_distinct(gold)))


def best_r_precision(ranked: Sequence[str], sets: Iterable[Collection[str]]) -> float:
    """The best `r_precision` over sets of gold ids, each of which would do by itself.

    Args:
        ranked: ids, best first, each once.
        sets: at least one, none empty: one id each where gold passages are alternatives, all ids in one where all
            are needed.

    Source:
        R-precision of KILT over the provenance sets of a question (Petroni et al., NAACL 2021).
    """
    scores = [r_precision(ranked, gold) for gold in sets]
    if not scores:
        raise ValueError("there is no gold id, so that no ranking can be right or wrong; leave such questions out")
    return max(scores)


def first_of_each(ids: Iterable[str]) -> list[str]:
    """The distinct ids in the order in which they come first: pages of a ranking of passages."""
    return list(dict.fromkeys(ids))


def _hits(ranked: Sequence[str], gold: Collection[str], k: int) -> int:
    if k < 1:
        raise ValueError(f"k is {k}, and must be 1 or more")
    return len(_distinct(gold).intersection(ranked[:k]))


def _distinct(gold: Collection[str]) -> set[str]:
    if not gold:
        raise ValueError("there is no gold id, so that no ranking can be right or wrong; leave such questions out")
    return set(gold)
