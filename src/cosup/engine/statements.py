"""What a passage states of an answer: the sentence that holds it, or as much of that as a claim should have."""

import re
from bisect import bisect_right

from cosup.data.documents import sentences

MOST_WORDS = 20
"""Of a statement; an answer that is longer is one by itself."""

_VERDICTS = frozenset({"yes", "no", "true", "false", "supports", "refutes"})
_WORD = re.compile(r"\S+")
_DASHES = "-\u2013\u2014"
_CLAUSE_ENDS = (*",;:)]", *_DASHES)


def statement(question: str, answer: str, text: str, *, most: int = MOST_WORDS) -> str:
    """The sentence of a text that holds an answer; of a long one, whole clauses around it as far as they fit.

    Of several sentences with the answer it is the first that shares most words with the question. A clause that is too
    long by itself is cut between words.

    Args:
        question: what the answer is one to.
        answer: some words.
        text: of a passage.
        most: words that a statement may have, 1 or more.

    Returns:
        Words of the text as they stand there; the answer itself where it is a verdict, such as yes or no, where it has
        more than `most` words, and where the text does not hold it, letter case aside.
    """
    asked, wanted = _content(question), answer.strip()
    holding = [sentence for sentence in map(str.strip, sentences(text)) if _place(wanted, sentence)]
    if not holding or len(wanted.split()) > most or wanted.casefold() in _VERDICTS:
        return answer
    return _around(wanted, max(holding, key=lambda sentence: len(asked & _content(sentence))), most)


def _content(text: str) -> set[str]:
    """Its words, but for the shortest, which are in every sentence."""
    return {word for word in re.findall(r"\w+", text.casefold()) if len(word) > 3}


def _place(answer: str, sentence: str) -> re.Match[str] | None:
    """Where a sentence has the answer as whole words."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", sentence, re.IGNORECASE) if answer else None


def _around(answer: str, sentence: str, most: int) -> str:
    words = list(_WORD.finditer(sentence))
    place = _place(answer, sentence)
    assert place is not None
    first = bisect_right([word.start() for word in words], place.start()) - 1
    last = bisect_right([word.start() for word in words], place.end() - 1) - 1
    start, end = _clauses([word.group() for word in words], first, last, most)
    if end == len(words):
        return sentence[words[start].start() :]
    return sentence[words[start].start() : words[end - 1].end()].rstrip(f" ,;:([{_DASHES}")


def _clauses(words: list[str], first: int, last: int, most: int) -> tuple[int, int]:
    """Which words to take, as a range: clauses around those from `first` to `last`, earlier ones before later ones."""
    begins = [n for n in range(1, len(words)) if words[n - 1].endswith(_CLAUSE_ENDS) or words[n].startswith(("(", "["))]
    bounds = [0, *(n for n in begins if not first < n <= last), len(words)]
    left, right = bisect_right(bounds, first) - 1, bisect_right(bounds, last)
    if bounds[right] - bounds[left] > most:
        start = max(bounds[left], last + 1 - most)
        return start, min(bounds[right], start + most)
    while left > 0 and bounds[right] - bounds[left - 1] <= most:
        left -= 1
    while right < len(bounds) - 1 and bounds[right + 1] - bounds[left] <= most:
        right += 1
    return bounds[left], bounds[right]
