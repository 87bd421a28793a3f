"""Ingests documents: text, Markdown, HTML and JSON Lines files become passages short enough to embed and to cite."""

import gzip
import hashlib
import html
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from cosup.config import UserError
from cosup.data.records import Passage

SUFFIXES = (".txt", ".md", ".markdown", ".html", ".htm", ".jsonl", ".jsonl.gz")
"""The names of files that are read end in one of these."""


def ingest(
    paths: Sequence[Path], *, max_words: int = 120, on_skip: Callable[[Path], None] = lambda path: None
) -> Iterator[Passage]:
    """Makes passages of documents.

    A passage's title is the headings that it stands under, `Document > Section > Subsection`: a section's own name
    (`Options`) says too little to be found by. Where no first-level heading governs, the document's declared title
    (HTML `<title>`, Markdown front matter) stands first, and without one the file name.

    Its text is as many whole paragraphs of one section as fit; a paragraph too long is split into its lines (list
    items, table rows, code), these into sentences, and these between words. A passage never goes over a heading.

    Its id is a hash of the file's path below its argument, the title and the text, so that ingesting again after an
    edit gives new ids to the passages that changed and to no others; a passage that occurs again gets the id with `-2`
    and so on. A line of a JSONL file keeps its text and its own `id` where it is short enough to be one passage;
    where not, its passages name that id in `meta` as `parent`.

    Args:
        paths: files, whose suffix must be among `SUFFIXES`, and folders, read recursively in the order of their names
            without hidden files and linked folders. A file that is met twice is read once.
        max_words: most words in a passage's text, from 1; a Chinese or Japanese character counts as a word.
        on_skip: called with each path in a folder that is not read, because of its suffix or because it is no file.

    Yields:
        The passages, file by file. `meta` holds `source`, the path as given, and `position`, from 1 within the file;
        and for JSONL the line's other keys, which win over these two. Empty files and blank lines yield nothing.

    Raises:
        UserError: a path that is missing or has another suffix, a folder without documents, a file that is not UTF-8
            or not the JSON Lines it says it is, an `id` that occurs twice, or `max_words` below 1.
    """
    if max_words < 1:
        raise UserError(f"max_words is {max_words}, and must be 1 or more; 120 suits most documents")
    occurrences: Counter[str] = Counter()
    for path, relative in list(_documents(paths, on_skip)):
        for position, piece in enumerate(_pieces_of(path, max_words), start=1):
            id = piece.id or _passage_id(relative, piece.title, piece.text)
            occurrences[id] += 1
            if occurrences[id] > 1 and piece.id:
                raise UserError(f"{path}: the id {id!r} occurs twice; ids must be unique, so change or remove one")
            suffix = f"-{occurrences[id]}" if occurrences[id] > 1 else ""
            meta = {"source": path.as_posix(), "position": position, **piece.meta}
            yield Passage(id + suffix, piece.text, piece.title, meta)


def _passage_id(relative: str, title: str, text: str) -> str:
    key = "\n".join((relative, title, text)).encode()
    return "p-" + hashlib.sha1(key, usedforsecurity=False).hexdigest()[:12]


# Which files


def _documents(paths: Iterable[Path], on_skip: Callable[[Path], None]) -> Iterator[tuple[Path, str]]:
    """Each file to read, once, with its path below the argument that led to it."""
    seen: set[Path] = set()
    for root in paths:
        for path in _folder(root, on_skip) if root.is_dir() else [_file(root)]:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path, path.relative_to(root).as_posix() if path != root else path.name


def _file(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"there is no file or folder {path}; name documents, or folders that hold some")
    if not _suffix(path):
        raise UserError(
            f"{path} can't be read as a document: its name must end in one of {', '.join(SUFFIXES)}; "
            "rename or convert it"
        )
    return path


def _folder(root: Path, on_skip: Callable[[Path], None]) -> list[Path]:
    found = []
    for path in _walk(root):
        if path.is_file() and _suffix(path):
            found.append(path)
        else:
            on_skip(path)
    if not found:
        raise UserError(f"the folder {root} holds no documents: no name in it ends in one of {', '.join(SUFFIXES)}")
    return found


def _walk(folder: Path) -> Iterator[Path]:
    with _explained(folder):
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        else:
            yield entry


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


# Reading them


@dataclass(frozen=True, slots=True)
class _Piece:
    """What becomes a passage; `id` is empty where it is to be made."""

    text: str
    title: str
    id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


class _Block(NamedTuple):
    """A paragraph, or, with a level from 1, a heading. Line breaks in it are meant."""

    text: str
    level: int = 0


def _pieces_of(path: Path, max_words: int) -> Iterator[_Piece]:
    if ".jsonl" in _suffix(path):
        for record in _records(path):
            yield from _pieces_of_record(record, max_words)
        return
    with _explained(path):
        text = _decoded(path.read_bytes(), str(path))
    for title, section in _sections(_READERS[_suffix(path)](text), path.stem):
        for part in _packed(section, max_words):
            yield _Piece(part, title)


def _sections(blocks: Iterable[_Block], name: str) -> Iterator[tuple[str, str]]:
    """The texts between headings, with the headings that govern each; `name` stands in for a first-level one."""
    headings = [_Block(name, level=1)]
    paragraphs: list[str] = []
    for block in [*blocks, _Block("", level=1)]:
        if not block.level:
            paragraphs.append(block.text)
            continue
        if paragraphs:
            yield " > ".join(heading.text for heading in headings), "\n\n".join(paragraphs)
        paragraphs = []
        headings = [*(heading for heading in headings if heading.level < block.level), block]


def _decoded(data: bytes, place: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{place} is not UTF-8: its byte {e.start + 1} is 0x{data[e.start]:02x}; "
            "convert it, for example with `iconv -f latin1 -t utf-8`"
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path} can't be read: {e}; mend it, or leave it out") from e


# JSON Lines


class _Record(BaseModel):
    """A line of a JSONL file; what else it holds goes into `meta`."""

    model_config = ConfigDict(extra="allow", strict=True)
    text: str
    title: str | None = None
    id: str | int | None = None
    meta: dict[str, Any] = {}


def _records(path: Path) -> Iterator[_Record]:
    with _explained(path), gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, data in enumerate(file, start=1):
            line = _decoded(data, f"{path}:{number}")
            if line.strip():
                yield _record(line, f"{path}:{number}")


def _record(line: str, place: str) -> _Record:
    try:
        return _Record.model_validate_json(line)
    except ValidationError as e:
        raise UserError(
            f"{place}: {_reason(e)}; each line must be an object such as "
            '{"text": "...", "title": "...", "id": "..."}, of which only "text" is needed'
        ) from None


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"][:1].lower() + first["msg"][1:]
    if not first["loc"]:
        return message
    value = "" if first["type"] == "missing" else f", not {first['input']!r:.60}"
    return f"{first['loc'][0]}: {message}{value}"


def _pieces_of_record(record: _Record, max_words: int) -> Iterator[_Piece]:
    id = "" if record.id is None else str(record.id)
    title = record.title or ""
    meta = {**record.meta, **(record.model_extra or {})}
    if record.text.strip() and _count(record.text) <= max_words:
        yield _Piece(record.text, title, id, meta)
        return
    parent = {"parent": id} if id else {}
    for part in _packed("\n\n".join(block.text for block in _plain(record.text)), max_words):
        yield _Piece(part, title, meta={**meta, **parent})


# Plain text

_BLANK_LINES = re.compile(r"\n\s*\n")


def _plain(text: str) -> Iterator[_Block]:
    """The paragraphs of a text. Line breaks within them are not meant, so that wrapping a text anew changes no id."""
    for paragraph in _BLANK_LINES.split(text):
        if joined := " ".join(paragraph.split()):
            yield _Block(joined)


# Markdown

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


def _markdown(text: str) -> Iterator[_Block]:
    """Headings, paragraphs and fenced code of Markdown. Lists and tables keep their lines, links only their text."""
    start = 0
    if front := _FRONT_MATTER.match(text):
        start = front.end()
        if title := _FRONT_TITLE.search(front["yaml"]):
            yield _Block(title["title"], level=1)
    for fence in _FENCE.finditer(text, start):
        yield from _markdown_prose(text[start : fence.start()])
        if code := fence["code"].strip("\n"):
            yield _Block(code)
        start = fence.end()
    yield from _markdown_prose(text[start:])


def _markdown_prose(text: str) -> Iterator[_Block]:
    text = re.sub(r"<!--.*?(?:-->|\Z)", "", text, flags=re.DOTALL)
    text = _ATX_HEADING.sub(r"\n\n\g<0>\n\n", text)
    for paragraph in _BLANK_LINES.split(text):
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


def _block(markdown: str, *, level: int = 0) -> Iterator[_Block]:
    if text := _unwrapped(_without_markup(markdown)):
        yield _Block(text, level)


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


# HTML

_UNREAD_TAGS = {"nav", "script", "style", "svg", "template"}
_BLOCK_TAG = re.compile(
    "address|article|aside|blockquote|body|caption|dd|details|dialog|div|dl|dt|fieldset|figcaption|figure|footer|form|"
    "head|header|hr|html|legend|main|ol|option|p|pre|section|select|summary|table|tbody|tfoot|thead|title|ul|h[1-6]"
)
_LINE_TAGS = {"br", "li", "tr"}
_CELL_TAGS = {"td", "th"}
_HEADING_TAGS = {"title": 1, "h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}


def _html(text: str) -> Iterator[_Block]:
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
        self.blocks: list[_Block] = []
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
            self.blocks.append(_Block(text.strip("\n"), self._level))
            # A heading that is never closed ends with its first block.
            self._level = 0


_READERS: dict[str, Callable[[str], Iterator[_Block]]] = {
    ".txt": _plain,
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": _html,
    ".htm": _html,
}


# Splitting and packing

_CJK = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


def _packed(text: str, max_words: int) -> Iterator[str]:
    """Cuts a text into passages of at most `max_words`, each as long as the next piece allows."""
    packed, words = "", 0
    for piece in _pieces(text, max_words, (_paragraphs, _lines, sentences)):
        count = _count(piece)
        if words and words + count > max_words:
            yield packed.strip()
            packed, words = "", 0
        packed += piece
        words += count
    if words:
        yield packed.strip()


def _pieces(text: str, max_words: int, splits: Sequence[Callable[[str], Iterable[str]]]) -> Iterator[str]:
    """Pieces of at most `max_words` that joined give back the text, as coarse as the first of `splits` that does."""
    if _count(text) <= max_words:
        yield text
    elif splits:
        for part in splits[0](text):
            yield from _pieces(part, max_words, splits[1:])
    else:
        starts = [word.start() for word in _WORD.finditer(text)][max_words::max_words]
        yield from (text[start:end] for start, end in itertools.pairwise([0, *starts, len(text)]))


def _count(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))


def _paragraphs(text: str) -> Iterator[str]:
    ends = [blank.end() for blank in _BLANK_LINES.finditer(text)]
    return (text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)]))


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


# Sentences

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
