"""What the readers of other people's formats share: ids, and errors that name the file and the place."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from cosup.config import UserError
from cosup.data.records import Passage, Question

Model = TypeVar("Model")


class Part(BaseModel):
    """A part of a file; keys that are not read may be anything."""

    model_config = ConfigDict(extra="ignore", strict=True)


def passage_id(title: str, text: str) -> str:
    """`p-` and the first 12 hex digits of sha1(title, newline, text)."""
    return "p-" + hashlib.sha1(f"{title}\n{text}".encode(), usedforsecurity=False).hexdigest()[:12]


def read_json(path: Path, shape: type[Model], *, name: str) -> Model:
    """A whole JSON file, plain or gzipped, as a model.

    Raises:
        UserError: the file can't be read, is not JSON, or not of this shape; the place is named.
    """
    return _validated(TypeAdapter(shape), _bytes(path, name), f"{path} is not {name}")


def read_json_lines(path: Path, shape: type[Model], *, name: str) -> Iterator[tuple[int, Model]]:
    """The lines of a JSON Lines file, plain or gzipped, as models, with their numbers from 1; see `read_json`."""
    adapter = TypeAdapter(shape)
    try:
        with path.open("rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(raw) if zipped else raw as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, _validated(adapter, line, f"{path}:{number} is not {name}")
    except (OSError, EOFError, zlib.error) as e:
        raise _unreadable(path, e, name) from None


def first_json_line(path: Path) -> Any:
    """The first line that is JSON by itself, as JSON values; None where there is none."""
    try:
        with path.open("rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(raw) if zipped else raw as file:
                line = next((line for line in file if line.strip()), b"")
        return json.loads(line)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error):
        return None


def refuse_repeated(path: Path, questions: list[Question]) -> list[Question]:
    """The questions. Raises UserError if an id occurs twice."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"{path}: the question id {question.id!r} occurs twice; ids must be unique")
        seen.add(question.id)
    return questions


def gather(
    path: Path, parts: Iterable[tuple[Sequence[Passage], Sequence[Question]]]
) -> tuple[list[Passage], list[Question]]:
    """The distinct passages, and all questions, of the parts of a file. Raises UserError if a question's id repeats."""
    passages: dict[str, Passage] = {}
    questions: list[Question] = []
    for own, asked in parts:
        passages.update({passage.id: passage for passage in own})
        questions += asked
    return list(passages.values()), refuse_repeated(path, questions)


def distinct(values: Iterator[str] | list[str]) -> list[str]:
    """Those that are not blank, each once, in order."""
    return list(dict.fromkeys(value for value in values if value.strip()))


def _bytes(path: Path, name: str) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as e:
        raise _unreadable(path, e, name) from None


def _unreadable(path: Path, error: Exception, name: str) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"there is no file {path}; name a file of {name}")
    return UserError(f"{path} can't be read ({getattr(error, 'strerror', None) or error}); name a file of {name}")


def _validated(adapter: TypeAdapter[Model], raw: bytes, what: str) -> Model:
    try:
        return adapter.validate_json(raw)
    except ValidationError as e:
        raise UserError(f"{what}: {_reason(e)}") from None


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "json_invalid":
        return f"{first['msg']}; unpack or download it again"
    if first["type"] == "missing":
        return f"{place} is missing; add it, or take the record out"
    if first["type"] == "value_error":
        return f"{place}: {first['msg'].removeprefix('Value error, ')}"
    return f"{place or 'it'} is {first['input']!r:.60}, but the {first['msg'][:1].lower() + first['msg'][1:]}"
