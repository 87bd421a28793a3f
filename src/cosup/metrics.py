"""Pure metric functions: answers against references, rankings against gold passages. Every score is in [0, 1]."""

import re
import string
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-cases a text, takes out ASCII punctuation and English articles, and joins its words with single spaces.

    Punctuation goes without leaving a space (`state-of-the-art` becomes `stateoftheart`), and letters keep their
    accents: both as in the source, so that scores can be compared with published ones.

    Args:
        text: a prediction or an answer.

    Returns:
        The normalised text; empty where nothing is left.

    Source:
        `normalize_answer` of the official SQuAD v1.1 evaluation script (Rajpurkar et al., EMNLP 2016).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def answer_in(text: str, answers: Iterable[str]) -> bool:
    """Says whether any answer stands, as whole words, in a text; both are normalised.

    Args:
        text: what is searched, such as a passage or a generated response.
        answers: accepted answers; one that is empty after normalisation never matches.

    Returns:
        Whether one of them was found; False without answers.
    """
    padded = f" {normalize_answer(text)} "
    return any(f" {answer} " in padded for answer in _normalized(answers))


def exact_match(text: str, answers: Iterable[str]) -> float:
    """1.0 if a prediction equals any answer after normalisation, else 0.0.

    Args:
        text: the prediction; 0.0 where it is empty after normalisation, while the official script lets it match an
            answer that is empty too.
        answers: accepted answers; 0.0 where there are none.

    Returns:
        1.0 or 0.0.

    Source:
        SQuAD v1.1, exact match.
    """
    return float(normalize_answer(text) in _normalized(answers))


def token_f1(text: str, answers: Iterable[str]) -> float:
    """The best F1 between the words of a prediction and those of any answer, as bags, after normalisation.

    Args:
        text: the prediction; 0.0 where it is empty after normalisation.
        answers: accepted answers; 0.0 where there are none.

    Returns:
        The harmonic mean of precision and recall over words, repeated words counted as often as they occur in both.

    Source:
        SQuAD v1.1, F1.
    """
    prediction = Counter(normalize_answer(text).split())
    return max((_f1(prediction, Counter(answer.split())) for answer in _normalized(answers)), default=0.0)


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


def _normalized(answers: Iterable[str]) -> list[str]:
    return [normalized for answer in answers if (normalized := normalize_answer(answer))]


def _f1(prediction: Counter[str], answer: Counter[str]) -> float:
    return 2 * (prediction & answer).total() / (prediction.total() + answer.total())


def _hits(ranked: Sequence[str], gold: Collection[str], k: int) -> int:
    if k < 1:
        raise ValueError(f"k is {k}, and must be 1 or more")
    return len(_distinct(gold).intersection(ranked[:k]))


def _distinct(gold: Collection[str]) -> set[str]:
    if not gold:
        raise ValueError("there is no gold id, so that no ranking can be right or wrong; leave such questions out")
    return set(gold)
