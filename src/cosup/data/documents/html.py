"""HTML as headings and paragraphs, its tags taken out."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser

from cosup.data.documents.blocks import Block

_UNREAD_TAGS = {"nav", "script", "style", "svg", "template"}
_BLOCK_TAG = re.compile(
    "address|article|aside|blockquote|body|caption|dd|details|dialog|div|dl|dt|fieldset|figcaption|figure|footer|form|"
    "head|header|hr|html|legend|main|ol|option|p|pre|section|select|summary|table|tbody|tfoot|thead|title|ul|h[1-6]"
)
_LINE_TAGS = {"br", "li", "tr"}
_CELL_TAGS = {"td", "th"}
_HEADING_TAGS = {"title": 1, "h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}


def read_html(text: str) -> Iterator[Block]:
    """Headings and paragraphs of HTML. List items and table rows are lines, cells are parted by ` | `."""
    reader = _HTMLReader()
    # The parser of older Pythons fails on `<![if IE]>` and its like.
    reader.feed(re.sub(r"<!\[[^>]*>?", "", text))
    reader.close()
    reader.end_block()
    yield from reader.blocks


class _HTMLReader(HTMLParser):
    """Collects the blocks of a page; character references are decoded by the parser."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._text: list[str] = []
        self._level = 0
        self._unread = 0
        self._preformatted = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begins a block, a heading, a line or a part that is not read."""
        if tag in _UNREAD_TAGS:
            self._unread += 1
        if self._unread:
            return
        if _BLOCK_TAG.fullmatch(tag):
            self.end_block()
            self._level = _HEADING_TAGS.get(tag, self._level)
            self._preformatted = tag == "pre"
        elif tag in _LINE_TAGS:
            self._text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """Ends what `handle_starttag` began."""
        if tag in _UNREAD_TAGS:
            self._unread = max(0, self._unread - 1)
        elif self._unread:
            return
        elif _BLOCK_TAG.fullmatch(tag):
            self.end_block()
            self._level = 0 if tag in _HEADING_TAGS else self._level
            self._preformatted = False
        elif tag in _CELL_TAGS:
            self._text.append(" | ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes `<br/>` as `<br>`; an empty element that would not be read needs no end."""
        if tag not in _UNREAD_TAGS:
            self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        """Adds text; outside `pre`, its line breaks mean nothing."""
        if not self._unread:
            self._text.append(data if self._preformatted else re.sub(r"\s+", " ", data))

    def end_block(self) -> None:
        """Closes the paragraph or heading that is open, if any."""
        text = "".join(self._text)
        self._text = []
        if not self._preformatted:
            lines = (" ".join(line.split()).removesuffix(" |") for line in text.split("\n"))
            text = "\n".join(line for line in lines if line)
        if text.strip():
            self.blocks.append(Block(text.strip("\n"), self._level))
            # A heading that is never closed ends with its first block.
            self._level = 0
