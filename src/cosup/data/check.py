"""Checks JSONL files for everything that would spoil a run, and reports all of it at once."""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path

from cosup.config import UserError
from cosup.data.records import (
    KINDS,
    Evidence,
    Example,
    Kind,
    Passage,
    Problem,
    Question,
    Record,
    kind_or_problem,
    numbered_records,
)

_Places = dict[str, tuple[Path, int]]
"""The file and line at which each id was first seen."""


def check(paths: Sequence[Path]) -> list[Problem]:
    """Finds every problem of JSONL files of passages, questions and examples.

    Reported are lines that are no record of the file's kind, ids that repeat within a kind, blank texts, questions and
    claims, and examples without a response. Where at least one file holds passages, citations of passages that are in
    none of those files are reported too. A file that can't be read is reported at the line reached, and doesn't hide
    the problems of the others. Files are streamed; only ids are kept in memory.

    Args:
        paths: the files, plain or gzipped, in any order; one that is named twice is checked once.

    Returns:
        The problems, by file in the order given, then by line; empty where all is well.
    """
    kinds = {path: _kind(path) for path in paths}
    places: dict[Kind, _Places] = {kind: {} for kind in KINDS}
    corpus = places["passages"] if "passages" in kinds.values() else None
    found: dict[Path, list[Problem]] = {}
    # Passages first, so that citations are looked up among all of them.
    for path, kind in sorted(kinds.items(), key=lambda item: item[1] != "passages"):
        found[path] = [kind] if isinstance(kind, Problem) else list(_check_file(path, kind, places[kind], corpus))
    return list(chain.from_iterable(found[path] for path in kinds))


def _kind(path: Path) -> Kind | Problem:
    try:
        return kind_or_problem(path)
    except UserError as e:
        return Problem(path, 1, str(e))


def _check_file(path: Path, kind: Kind, places: _Places, corpus: Collection[str] | None) -> Iterator[Problem]:
    line = 1
    try:
        for line, record in numbered_records(path, kind):
            if isinstance(record, Problem):
                yield record
            else:
                for reason in chain(_repeated(record, path, line, places), _blank(record), _dangling(record, corpus)):
                    yield Problem(path, line, reason)
    except UserError as e:
        yield Problem(path, line, f"{e}; nothing after this line was checked")


def _repeated(record: Record, path: Path, line: int, places: _Places) -> Iterator[str]:
    first_path, first_line = places.setdefault(record.id, (path, line))
    if (first_path, first_line) != (path, line):
        yield f"the id {record.id!r} is already that of {first_path}:{first_line}; ids must be unique"


def _blank(record: Record) -> Iterator[str]:
    if isinstance(record, Example) and not record.response:
        yield "response: it has no part; add a text or a citation, or take the example out"
    for name, text in _texts(record):
        if not text.strip():
            yield f"{name}: it is blank; fill it in, or take the record out"


def _texts(record: Record) -> Iterator[tuple[str, str]]:
    if isinstance(record, Passage):
        yield "text", record.text
        return
    yield "question", record.question
    if isinstance(record, Example):
        for number, part in enumerate(record.response):
            if isinstance(part, Evidence):
                yield f"response.{number}.claim", part.claim


def _dangling(record: Record, corpus: Collection[str] | None) -> Iterator[str]:
    if corpus is None:
        return
    for id in dict.fromkeys(_cited(record)):
        if id not in corpus:
            yield f"cites passage {id!r}, which is in none of the passages files"


def _cited(record: Record) -> Iterator[str]:
    if isinstance(record, Question):
        yield from (*record.gold, *record.negatives)
    elif isinstance(record, Example):
        for part in record.evidence:
            yield from (part.passage, *part.also, *part.negatives)
