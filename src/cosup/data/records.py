"""The records of cosup and their JSON Lines, plain or gzipped: passages, questions, examples."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from cosup.config import UserError
from cosup.files import atomic_file

_STRICT = ConfigDict(extra="forbid", strict=True)
Id = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that can be retrieved and cited.

    Args:
        id: unique in its corpus.
        text: what is read.
        title: embedded and inserted before the text where there is one.
        meta: anything about it; `source`, `url`, `parent` and `tags` are understood.
    """

    __pydantic_config__ = _STRICT
    id: Id
    text: Annotated[str, Field(min_length=1)]
    title: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QAPair:
    """A question inside a question: one hop of several, or one reading of an ambiguous question."""

    __pydantic_config__ = _STRICT
    question: str
    short_answers: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with what is known of its answer.

    Args:
        id: unique in its file.
        task: its task, which has a rule that makes an example of it.
        question: the text that Gen reads.
        answers: accepted short answers, the preferred one first.
        gold: ids of passages that hold the answer; alternatives or hops in order, as the task's rule says.
        long_answers: accepted long answers.
        claims: statements that a complete answer makes.
        qa_pairs: the hops, or the readings, of the question.
        negatives: ids of passages that look right and are not.
        silver: whether gold was found by matching and not by annotation.
        label: the verdict on a claim, where the question is one.
        pages: ids of pages that hold the answer, where gold is known by page; `meta.page` of a passage, or its title.
        candidates: ids of the passages that retrieval may choose from, where the question brings its own list.
    """

    __pydantic_config__ = _STRICT
    id: Id
    task: Id
    question: Annotated[str, Field(min_length=1)]
    answers: list[str] = field(default_factory=list)
    gold: list[Id] = field(default_factory=list)
    long_answers: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)
    qa_pairs: list[QAPair] = field(default_factory=list)
    negatives: list[Id] = field(default_factory=list)
    silver: bool = False
    label: str = ""
    pages: list[Id] = field(default_factory=list)
    candidates: list[Id] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Text:
    """A part of a response that Gen writes by itself."""

    __pydantic_config__ = _STRICT
    text: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """A part of a response that rests on a passage: `[Ret] <passage> [Cs] claim [Ce]`.

    Args:
        passage: id of the passage to retrieve, the label of `nsp`.
        claim: what Gen says of it.
        also: ids that would be right too, neither label nor negative.
        negatives: ids of hard negatives.
    """

    __pydantic_config__ = _STRICT
    passage: Id
    claim: str
    also: Annotated[tuple[Id, ...], Field(strict=False)] = ()
    negatives: Annotated[tuple[Id, ...], Field(strict=False)] = ()


def _kind_of_part(part: Any) -> str:
    return "text" if isinstance(part, Text) or (isinstance(part, dict) and "text" in part) else "evidence"


Part = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Evidence, Tag("evidence")],
    Discriminator(_kind_of_part),
]


@dataclass(frozen=True, slots=True)
class Example:
    """A question and the response to learn."""

    __pydantic_config__ = _STRICT
    id: Id
    task: Id
    question: Annotated[str, Field(min_length=1)]
    response: Annotated[tuple[Part, ...], Field(strict=False)]

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """The parts that cite, in order: one for each retrieval."""
        return tuple(part for part in self.response if isinstance(part, Evidence))


Record = Passage | Question | Example
Kind = Literal["passages", "questions", "examples"]
KINDS: dict[Kind, type[Record]] = {"passages": Passage, "questions": Question, "examples": Example}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one line of a file."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def read_passages(*paths: Path) -> Iterator[Passage]:
    """The passages of JSONL files, in order; see `read_records` for what it raises."""
    yield from _read("passages", paths)  # type: ignore[misc]


def read_questions(*paths: Path) -> Iterator[Question]:
    """The questions of JSONL files, in order; see `read_records` for what it raises."""
    yield from _read("questions", paths)  # type: ignore[misc]


def read_examples(*paths: Path) -> Iterator[Example]:
    """The examples of JSONL files, in order; see `read_records` for what it raises."""
    yield from _read("examples", paths)  # type: ignore[misc]


def _read(kind: Kind, paths: Iterable[Path]) -> Iterator[Record]:
    seen: set[str] = set()
    for path in paths:
        for record in read_records(path, kind):
            if isinstance(record, Problem):
                raise UserError(str(record))
            if record.id in seen:
                raise UserError(f"{path}: the id {record.id!r} occurs twice; ids must be unique")
            seen.add(record.id)
            yield record


def read_records(path: Path, kind: Kind) -> Iterator[Record | Problem]:
    """The records of one JSONL file, and in the place of each line that is none, the problem with it.

    Raises:
        UserError: the file does not exist, can't be read, or is a damaged gzip file.
    """
    return (record for _, record in numbered_records(path, kind))


def numbered_records(path: Path, kind: Kind) -> Iterator[tuple[int, Record | Problem]]:
    """As `read_records`, each with the number of its line, from 1."""
    adapter = _adapter(kind)
    for number, line in _lines(path):
        try:
            yield number, adapter.validate_json(line)
        except ValidationError as e:
            other = _kind_of_line(line)
            mistaken = other is not None and other != kind
            reason = f"the line is one of {other}, and {kind} belong here" if mistaken else _reason(e, line)
            yield number, Problem(path, number, reason)


def kind_of(path: Path) -> Kind:
    """What a JSONL file holds, by the keys of its first line that is recognisable.

    Raises:
        UserError: the file can't be read or is empty, or no line of it is one of ours.
    """
    kind = kind_or_problem(path)
    if isinstance(kind, Problem):
        raise UserError(str(kind))
    return kind


def kind_or_problem(path: Path) -> Kind | Problem:
    """As `kind_of`, but where no line is recognisable, the problem with the first one.

    Raises:
        UserError: the file can't be read.
    """
    first = None
    for number, line in _lines(path):
        if kind := _kind_of_line(line):
            return kind
        first = first or number
    if first is None:
        return Problem(path, 1, "there is no record: the file is empty; leave it out, or fill it")
    return Problem(path, first, "neither a passage (`text`), a question (`question`) nor an example (`response`)")


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Writes records as JSONL, gzipped if the name ends in `.gz`, whole or not at all; empty fields are left out.

    Returns:
        How many were written.
    """
    count = 0
    with atomic_file(path) as raw, _encoder(path, raw) as file:
        for record in records:
            file.write(json.dumps(to_json(record), ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def to_json(record: Record) -> dict[str, Any]:
    """A record as JSON values; fields that are empty are left out."""
    raw = asdict(record)
    for part in raw.get("response", ()):
        for key in ("also", "negatives"):
            if not part.get(key, True):
                del part[key]
    optional = {"title", "meta", "long_answers", "claims", "qa_pairs", "negatives", "silver", "label"}
    optional |= {"pages", "candidates"}
    return {key: value for key, value in raw.items() if value or key not in optional}


def _kind_of_line(line: bytes) -> Kind | None:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return None
    keys: dict[str, Kind] = {"response": "examples", "question": "questions", "text": "passages"}
    return next((kind for key, kind in keys.items() if key in raw), None) if isinstance(raw, dict) else None


@cache
def _adapter(kind: Kind) -> TypeAdapter[Any]:
    return TypeAdapter(KINDS[kind])


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        with path.open("rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(raw) if zipped else raw as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, line.rstrip()
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; name a JSONL file, plain or gzipped") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a JSONL file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path} is a damaged gzip file ({e}); copy or download it again") from None
    except OSError as e:
        raise UserError(f"{path} can't be read ({e.strerror or e}); mend that, or name another file") from None


def _encoder(path: Path, raw: IO[bytes]) -> AbstractContextManager[gzip.GzipFile | IO[bytes]]:
    return gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) if path.suffix == ".gz" else nullcontext(raw)


def _reason(error: ValidationError, line: bytes) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as e:
        return f"not UTF-8 (byte {e.start + 1} of the line)"
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"not JSON: {first['msg'].removeprefix('Invalid JSON: ').replace(' at line 1 column ', ' at column ')}"
    where = ".".join(str(part) for part in first["loc"] if part not in ("text", "evidence") or len(first["loc"]) == 1)
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown key {where!r}"
    if first["type"] in ("missing", "missing_argument"):
        return f"the key {where!r} is missing"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{where}: {message}" if where else message
