"""Markdown as headings and paragraphs, its markup taken out."""

import html
import itertools
import re
from collections.abc import Iterator

from cosup.data.documents.blocks import BLANK_LINES, Block

_FRONT_MATTER = re.compile(r"\A---\n(?P<yaml>\w[\w-]*:.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"""^title:[ \t]*(["']?)(?P<title>\S.*?)\1[ \t]*$""", re.MULTILINE)
_FENCE = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n`]*\n(?P<code>.*?)(?:^[ \t]*(?P=fence)[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL
)
_ATX_HEADING = re.compile(
    r"^ {0,3}(?P<marks>#{1,6})[ \t]+(?P<text>[^\n]*?)(?:[ \t]+\{[^{}\n]*\})?(?:[ \t]+#+)?[ \t]*$", re.MULTILINE
)
_SETEXT_HEADING = re.compile(
    r"(?![ \t]*(?:[-*+>|#]|\d+[.)]))(?P<text>[^\n]+)\n {0,3}(?P<bar>={2,}|-{2,})[ \t]*(?:\n|\Z)"
)
_STARTS_LINE = re.compile(r"(?:[-*+]|\d+[.)]) |\|")
_LITERAL = re.compile(r"\\(?P<escaped>[!-/:-@\[-`{-~])|(?P<ticks>`+)(?!`)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)", re.DOTALL)
_HIDDEN = re.compile("\0(\\d+)\0")

_LINE_MARKUP = (
    (re.compile(r"^[ \t]*(?:>[ \t]?)+", re.MULTILINE), ""),  # quotation
    (re.compile(r"^(?:[ \t]*[-*_=|:]){3,}[ \t]*$", re.MULTILINE), ""),  # rule between parts, or under a table's head
    (re.compile(r"^[ \t]*\[[^\]^\n][^\]\n]*\]:[ \t].*$", re.MULTILINE), ""),  # target of links
)
_TARGET = r"(?:\((?:[^()\n]|\([^()\n]*\))*\)|\[[^\[\]\n]*\])"
_INLINE_MARKUP = (
    (re.compile(rf"!\[([^\[\]]*)\]{_TARGET}"), r"\1"),  # image
    (re.compile(rf"(?<!\w)\[([^\[\]]*)\]{_TARGET}"), r"\1"),  # link
    (re.compile(r"<((?:https?://|mailto:)[^<>\s]+)>"), r"\1"),
    (re.compile(r"</?(?:a|abbr|b|code|em|font|i|kbd|span|strong|sub|sup|u)(?:\s[^<>]*)?/?>", re.IGNORECASE), ""),
    (
        re.compile(
            r"</?(?:br|center|details|div|h[1-6]|hr|img|li|ol|p|picture|source|summary|table|tbody|td|th|thead|tr|ul)"
            r"(?:\s[^<>]*)?/?>",
            re.IGNORECASE,
        ),
        " ",
    ),
    (re.compile(r"(?<!\w)(\*\*|__|~~)(?=\S)(.{1,500}?)(?<=\S)\1(?!\w)", re.DOTALL), r"\2"),  # strong, struck out
    (re.compile(r"(?<![\w*])([*_])(?=[^\s*])(.{1,500}?)(?<=\S)\1(?!\w)", re.DOTALL), r"\2"),  # emphasis
)


def read_markdown(text: str) -> Iterator[Block]:
    """Headings, paragraphs and fenced code of Markdown. Lists and tables keep their lines, links only their text."""
    start = 0
    if front := _FRONT_MATTER.match(text):
        start = front.end()
        if title := _FRONT_TITLE.search(front["yaml"]):
            yield Block(title["title"], level=1)
    for fence in _FENCE.finditer(text, start):
        yield from _prose(text[start : fence.start()])
        if code := fence["code"].strip("\n"):
            yield Block(code)
        start = fence.end()
    yield from _prose(text[start:])


def _prose(text: str) -> Iterator[Block]:
    text = re.sub(r"<!--.*?(?:-->|\Z)", "", text, flags=re.DOTALL)
    text = _ATX_HEADING.sub(r"\n\n\g<0>\n\n", text)
    for paragraph in BLANK_LINES.split(text):
        rest = paragraph.strip("\n")
        if heading := _ATX_HEADING.fullmatch(rest):
            yield from _block(heading["text"], level=len(heading["marks"]))
            continue
        if heading := _SETEXT_HEADING.match(rest):
            yield from _block(heading["text"], level=1 if heading["bar"].startswith("=") else 2)
            rest = rest[heading.end() :]
        for markup, kept in _LINE_MARKUP:
            rest = markup.sub(kept, rest)
        yield from _block(rest)


def _block(markdown: str, *, level: int = 0) -> Iterator[Block]:
    if text := _unwrapped(_without_markup(markdown)):
        yield Block(text, level)


def _without_markup(text: str) -> str:
    """Takes inline markup out, but for escaped characters and what stands in code spans."""
    text = text.replace("\0", "")
    literals = [literal["escaped"] or literal["code"].strip() for literal in _LITERAL.finditer(text)]
    numbers = itertools.count()
    text = _LITERAL.sub(lambda _: f"\0{next(numbers)}\0", text)
    for markup, kept in _INLINE_MARKUP:
        text = markup.sub(kept, text)
    return _HIDDEN.sub(lambda hidden: literals[int(hidden[1])], html.unescape(text))


def _unwrapped(paragraph: str) -> str:
    """Joins the lines of a paragraph, but for list items and table rows, which begin new ones."""
    lines: list[str] = []
    for line in (" ".join(line.split()) for line in paragraph.split("\n")):
        if lines and line and not _STARTS_LINE.match(line):
            lines[-1] += f" {line}"
        elif line:
            lines.append(line)
    return "\n".join(lines)
