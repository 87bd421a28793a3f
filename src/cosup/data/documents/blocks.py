"""What every format is read into: paragraphs and headings. Plain text, the simplest of them, is read here."""

import re
from collections.abc import Iterator
from typing import NamedTuple

BLANK_LINES = re.compile(r"\n\s*\n")
"""Where one paragraph ends and the next begins."""


class Block(NamedTuple):
    """A paragraph, or, with a level from 1, a heading. Line breaks in it are meant."""

    text: str
    level: int = 0


def read_plain(text: str) -> Iterator[Block]:
    """The paragraphs of a text. Line breaks within them are not meant, so that wrapping a text anew changes no id."""
    for paragraph in BLANK_LINES.split(text):
        if joined := " ".join(paragraph.split()):
            yield Block(joined)
