"""Ingests documents: text, Markdown, HTML, PDF and JSON Lines become passages short enough to embed and to cite."""

import gzip
import hashlib
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cosup.config import UserError
from cosup.data.documents.blocks import BLANK_LINES, Block, read_plain
from cosup.data.documents.html import read_html
from cosup.data.documents.markdown import read_markdown
from cosup.data.documents.pdf import read_pdf
from cosup.data.documents.sentences import sentences
from cosup.data.records import Passage

__all__ = ["SUFFIXES", "ingest", "sentences"]

SUFFIXES = (".txt", ".md", ".markdown", ".html", ".htm", ".pdf", ".jsonl", ".jsonl.gz")
"""The names of files that are read end in one of these."""


def ingest(
    paths: Sequence[Path],
    *,
    max_words: int = 120,
    on_skip: Callable[[Path], None] = lambda path: None,
    leave_out: Path | None = None,
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
        leave_out: a file that is not read where a folder holds it: the one that the passages go to.

    Yields:
        The passages, file by file. `meta` holds `source`, the path as given, and `position`, from 1 within the file;
        for PDF `page`, from 1; and for JSONL the line's other keys, which win over these two. Empty files and blank
        lines yield nothing.

    Raises:
        UserError: a path that is missing or has another suffix, a folder without documents, a PDF that is damaged,
            encrypted or a scan without text, a file, or its name, that is not UTF-8, one that is not the JSON Lines it
            says it is, an `id` that occurs twice, or `max_words` below 1.
    """
    if max_words < 1:
        raise UserError(f"max_words is {max_words}, and must be 1 or more; 120 suits most documents")
    occurrences: Counter[str] = Counter()
    for path, relative in list(_documents(paths, on_skip, leave_out)):
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


def _documents(
    paths: Iterable[Path], on_skip: Callable[[Path], None], leave_out: Path | None
) -> Iterator[tuple[Path, str]]:
    """Each file to read, once, with its path below the argument that led to it."""
    seen: set[Path] = {leave_out.resolve()} if leave_out else set()
    for root in paths:
        for path in _folder(root, on_skip) if root.is_dir() else [_file(root)]:
            if path.resolve() not in seen:
                _refuse_unwritable_name(path)
                seen.add(path.resolve())
                yield path, path.relative_to(root).as_posix() if path != root else path.name


def _refuse_unwritable_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the name {str(path)!r} is not UTF-8, so no passage can hold it; rename the file") from None


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


def _pieces_of(path: Path, max_words: int) -> Iterator[_Piece]:
    if ".jsonl" in _suffix(path):
        for record in _records(path):
            yield from _pieces_of_record(record, max_words)
        return
    if _suffix(path) == ".pdf":
        yield from _pieces_of_pdf(path, max_words)
        return
    with _explained(path):
        text = _decoded(path.read_bytes(), str(path))
    for title, section in _sections(_READERS[_suffix(path)](text), path.stem):
        for part in _packed(section, max_words):
            yield _Piece(part, title)


def _pieces_of_pdf(path: Path, max_words: int) -> Iterator[_Piece]:
    title, pages = read_pdf(path)
    for number, page in enumerate(pages, start=1):
        for part in _packed(page, max_words):
            yield _Piece(part, title or path.stem, meta={"page": number})


def _sections(blocks: Iterable[Block], name: str) -> Iterator[tuple[str, str]]:
    """The texts between headings, with the headings that govern each; `name` stands in for a first-level one."""
    headings = [Block(name, level=1)]
    paragraphs: list[str] = []
    for block in [*blocks, Block("", level=1)]:
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
    for part in _packed("\n\n".join(block.text for block in read_plain(record.text)), max_words):
        yield _Piece(part, title, meta={**meta, **parent})


_READERS: dict[str, Callable[[str], Iterator[Block]]] = {
    ".txt": read_plain,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
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
    ends = [blank.end() for blank in BLANK_LINES.finditer(text)]
    return (text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)]))


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
