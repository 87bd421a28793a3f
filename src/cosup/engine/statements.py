"""What a passage states of an answer: the sentence that holds it, or as much of that as a claim should have."""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from cosup.data.documents import sentences

MOST_WORDS = 20
"""Of a statement; an answer that is longer is one by itself."""

_VERDICTS = frozenset({"yes", "no", "true", "false", "supports", "refutes"})
_ASKING = frozenset({"does", "what", "when", "where", "which", "whom", "whose"})
_WORD = re.compile(r"\S+")
_DASHES = "-\u2013\u2014"
_CLAUSE_ENDS = (*",;:)]", *_DASHES)


def statement(question: str, answer: str, text: str, *, title: str = "", most: int = MOST_WORDS) -> str:
    """The sentence of a text that holds an answer; of a long one, whole clauses around it as far as they fit.

    Of several sentences with the answer it is the first that shares most words with the question. An answer that the
    text does not hold becomes the first sentence that shares most words with it and the question, or clauses around
    those. A clause that is too long by itself is cut between words.

    Args:
        question: what the answer is one to.
        answer: some words.
        text: of a passage.
        title: of it.
        most: words that a statement may have, 1 or more.

    Returns:
        Words of the text as they stand there; the answer itself where it is a verdict, such as yes or no, or ends with
        one that the text does not hold, where it stands in the title alone, where it is of the text and has more than
        `most` words or goes beyond a sentence, and where no sentence shares a word with it or the question.
    """
    asked, wanted, every = _content(question), answer.strip(), [*map(str.strip, sentences(text))]
    holding = [sentence for sentence in every if _place(wanted, sentence)]
    if holding and len(wanted.split()) <= most and not _is_verdict(wanted):
        sentence = _nearest(asked, holding)
        return _around(sentence, *_words_of(wanted, sentence), most)
    known = asked | _content(wanted)
    if _place(wanted, text) or _place(wanted, title) or not wanted or _is_verdict(wanted.split()[-1]):
        return answer
    sentence = _nearest(known, every) if every else ""
    return _around(sentence, *_known_words(known, sentence), most) if known & _content(sentence) else answer


def _is_verdict(text: str) -> bool:
    return text.strip(".!\"'").casefold() in _VERDICTS


def _nearest(words: set[str], found: Sequence[str]) -> str:
    """The first sentence that shares most of the words."""
    return max(found, key=lambda sentence: len(words & _content(sentence)))


def _content(text: str) -> set[str]:
    """Its words, but for the shortest, which are in every sentence, and those that only ask."""
    return {word for word in re.findall(r"\w+", text.casefold()) if len(word) > 3} - _ASKING


def _place(answer: str, sentence: str) -> re.Match[str] | None:
    """Where a sentence has the answer as whole words."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", sentence, re.IGNORECASE) if answer else None


def _words_of(answer: str, sentence: str) -> tuple[int, int]:
    """The first and the last word of a sentence that an answer has part in."""
    place, starts = _place(answer, sentence), [word.start() for word in _WORD.finditer(sentence)]
    assert place is not None
    return bisect_right(starts, place.start()) - 1, bisect_right(starts, place.end() - 1) - 1


def _known_words(known: set[str], sentence: str) -> tuple[int, int]:
    """The first and the last word of the stretch of a sentence with most known words and no others but short ones."""
    return max(_stretches(known, sentence), key=lambda stretch: stretch[2])[:2]


def _stretches(known: set[str], sentence: str) -> Iterator[tuple[int, int, int]]:
    """Where each stretch begins and ends, with a known word, and how many of them it has."""
    first, last, count = -1, -1, 0
    for number, word in enumerate(sentence.split()):
        words = _content(word)
        if words - known and count:
            yield first, last, count
            count = 0
        if words & known:
            first, last, count = (first if count else number), number, count + 1
    if count:
        yield first, last, count


def _around(sentence: str, first: int, last: int, most: int) -> str:
    """As many whole clauses of a sentence around some of its words as may be taken."""
    words = list(_WORD.finditer(sentence))
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
