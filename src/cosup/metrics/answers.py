"""Answers against references. Every score is in [0, 1]."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WORD = re.compile(r"[a-z0-9]+")
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
    return found_in(normalize_answer(text), _normalized(answers))


def found_in(normalized: str, answers: Iterable[str]) -> bool:
    """As `answer_in` for texts that `normalize_answer` has normalised already; answers must not be empty."""
    padded = f" {normalized} "
    return any(f" {answer} " in padded for answer in answers)


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


def rouge_l(text: str, references: Iterable[str]) -> float:
    """The best ROUGE-L F1 between a prediction and any reference: the longest common subsequence of their words.

    Words are runs of the letters a to z and of digits, lower-cased, as in the package rouge-score without its stemmer.

    Args:
        text: the prediction.
        references: 0.0 where there are none.

    Returns:
        The harmonic mean of the subsequence's share of the prediction and of the reference.

    Source:
        Lin, ROUGE (2004).
    """
    prediction = _words(text)
    return max((_rouge_l(prediction, _words(reference)) for reference in references), default=0.0)


def string_em(text: str, readings: Iterable[Iterable[str]]) -> float:
    """The share of the readings of an ambiguous question of which a short answer stands in a text.

    Args:
        text: the whole answer.
        readings: the short answers of each reading; 0.0 where there are none.

    Returns:
        A value in [0, 1]. As in the source an answer is found inside of words too; an empty one is never found.

    Source:
        STR-EM of ALCE (Gao et al., EMNLP 2023); its STR-EM-hit is 1.0 where this is 1.0.
    """
    normalized = normalize_answer(text)
    found = [any(answer in normalized for answer in _normalized(answers)) for answers in readings]
    return sum(found) / len(found) if found else 0.0


def verdict(text: str, labels: Iterable[str]) -> str:
    """The one label that stands in a text as whole words; empty where none does, or more than one.

    Args:
        text: a claim, such as `188, so true`.
        labels: what could be said, such as SUPPORTS and REFUTES; case and punctuation don't matter.
    """
    said = [label for label in labels if answer_in(text, [label])]
    return said[0] if len(said) == 1 else ""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _rouge_l(prediction: Sequence[str], reference: Sequence[str]) -> float:
    common = _common_subsequence(prediction, reference)
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: one big-integer step for each word of b (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(a) - row.bit_count()


def _normalized(answers: Iterable[str]) -> list[str]:
    return [normalized for answer in answers if (normalized := normalize_answer(answer))]


def _f1(prediction: Counter[str], answer: Counter[str]) -> float:
    return 2 * (prediction & answer).total() / (prediction.total() + answer.total())
