"""Splitting text into sentences."""

import itertools
import re

_TOKEN = re.compile(r"\S+\s*")
_SENTENCE_END = re.compile("[.!?…][\"'\u201d\u2019»)\\]]*$")
_OPENERS = "\"'\u201c\u2018«([¿¡"
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+")
_BEFORE_NAMES = re.compile(
    r"(?:adm|al|approx|capt|cf|cmdr|col|cpl|dr|e\.g|fr|gen|gov|hon|i\.e|lt|maj|messrs|mr|mrs|ms|mt|mx|pres|prof|rep|"
    r"rev|sen|sgt|st|viz|vs)\.",
    re.IGNORECASE,
)
_BEFORE_NUMBERS = re.compile(
    r"(?:apr|art|aug|c|ca|ch|circa|dec|eqs?|feb|figs?|jan|jul|jun|mar|nos?|nov|oct|pp?|par|sect?|sept?|tab|vols?)\.",
    re.IGNORECASE,
)


def sentences(text: str) -> list[str]:
    """Splits a text into sentences by rules made for English.

    A sentence ends at `.`, `!`, `?` or `…`, with closing quotes and brackets, before white space and anything but a
    lower-case letter, and at a blank line. It does not end after titles (`Dr.`), initials (`J. R. R.`, `U.S.`), `e.g.`
    and its like, an abbreviation before a number (`No. 5`), or the number of a list item. In doubt it goes on: `in the
    U.S. The` is not split.

    Args:
        text: any text.

    Returns:
        The sentences, each with the white space that follows it: joined by nothing they give back the text.
    """
    if not text:
        return []
    starts = [0]
    for token, following in itertools.pairwise(_TOKEN.finditer(text)):
        numbers_item = token.start() == starts[-1] and token[0].rstrip()[:-1].isdigit()
        if not numbers_item and _ends_sentence(token[0], following[0]):
            starts.append(token.end())
    return [text[start:end] for start, end in itertools.pairwise([*starts, len(text)])]


def _ends_sentence(token: str, following: str) -> bool:
    word = token.strip().lstrip(_OPENERS)
    if token.count("\n") > 1:
        return True
    if not _SENTENCE_END.search(word) or following.lstrip(_OPENERS)[:1].islower():
        return False
    if following[0].isdigit() and _BEFORE_NUMBERS.fullmatch(word):
        return False
    return not (_BEFORE_NAMES.fullmatch(word) or _INITIALS.fullmatch(word))
