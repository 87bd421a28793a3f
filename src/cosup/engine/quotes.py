"""Claims that are words of their passage, as they stand there."""

import re
from collections.abc import Iterator, Sequence

from cosup.data import Passage
from cosup.template import Template

_LONGEST = 64  # words of a quotation


class Quotes:
    """What a claim may go on with so that it stays a piece of its passage: whole words, at most 64 of them.

    A claim is encoded apart from its passage, so that every word at which one may begin has a sequence of ids of its
    own, and a claim is the beginning of one of these sequences.

    Args:
        title: of the passage.
        text: of it, as far as Gen has read it; both are quoted, each for itself.
        template: encodes them.
    """

    def __init__(self, title: str, text: str, template: Template):
        pieces = [piece for whole in (title, text) for piece in _pieces(whole)]
        self._sequences = [
            (ids, _word_ends(piece, spans)) for piece, (ids, spans) in zip(pieces, template.spans(pieces), strict=True)
        ]

    def next(self, claim: Sequence[int]) -> tuple[list[int], bool]:
        """Ids that may follow, and whether the claim may end here.

        Args:
            claim: the ids that it has so far.
        """
        written = list(claim)
        count = len(written)
        here = [(ids, ends) for ids, ends in self._sequences if ids[:count] == written]
        following = dict.fromkeys(ids[count] for ids, _ in here if len(ids) > count)
        return list(following), not following or any(count in ends for _, ends in here)


def text_read(passage: Passage, inserted: Sequence[int], template: Template) -> str:
    """How much of a passage's text Gen has read, of the ids that were inserted."""
    title = len(template.passage_text(passage)) - len(passage.text)  # and what stands between
    return passage.text[: max(len(template.decode(inserted)) - title, 0)]


def _pieces(text: str) -> Iterator[str]:
    """What may be quoted, from each word on, and from behind the marks before a word."""
    words = list(re.finditer(r"\S+", text))
    for number, word in enumerate(words):
        end = words[min(number + _LONGEST, len(words)) - 1].end()
        marks = re.match(r"\W*", word.group())
        starts = {word.start(), word.start() + (marks.end() if marks else 0)} - {word.end()}
        yield from (text[start:end] for start in sorted(starts))


def _word_ends(piece: str, spans: Sequence[tuple[int, int]]) -> set[int]:
    """After how many of its ids a piece is at the end of a word, marks behind it left aside."""
    ends = set()
    for count, (_, end) in enumerate(spans, start=1):
        whole = count == len(spans) or spans[count][0] >= end  # else the next id is of the same character
        if whole and re.match(r"[^\w\s]*(\s|$)", piece[end:]):
            ends.add(count)
    return ends
