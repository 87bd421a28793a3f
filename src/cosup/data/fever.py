"""FEVER: claims with sentence evidence, and the Wikipedia pages that it points into."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cosup.data.foreign import Part, distinct, read_json_lines, refuse_repeated
from cosup.data.records import Passage, Question

_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-COLON-": ":"}

_Item = tuple[int | None, int | None, str | None, int | None]


class _Record(Part):
    id: int | str
    claim: Annotated[str, Field(min_length=1)]
    label: str = ""
    evidence: Annotated[list[list[_Item]], Field(strict=False)] = Field(default_factory=list)


class _Page(Part):
    id: str
    lines: str = ""


def is_fever(record: object) -> bool:
    """Whether a JSON line looks like a claim of FEVER."""
    return isinstance(record, dict) and {"id", "claim"} <= record.keys()


def read_fever(path: Path) -> list[Question]:
    """Reads a file of FEVER claims.

    Args:
        path: JSON Lines; test files without labels are read too.

    Returns:
        The claims, task `fever`: the label is the answer too. `gold` are evidence sentences as `read_fever_pages`
        names them (`<page>#<sentence>`), `pages` their titles; a claim labelled NOT ENOUGH INFO has neither.

    Raises:
        UserError: the file can't be read, is not of this form, or an id occurs twice.

    Source:
        FEVER (Thorne et al., NAACL 2018).
    """
    records = (record for _, record in read_json_lines(path, _Record, name="FEVER JSON Lines"))
    return refuse_repeated(path, [_question(record) for record in records])


def read_fever_pages(path: Path) -> Iterator[Passage]:
    """The sentences of a file of FEVER's Wikipedia pages, one passage each; `meta.page` is the page's title.

    Raises:
        UserError: as `read_fever`.
    """
    for _, page in read_json_lines(path, _Page, name="FEVER's Wikipedia pages"):
        title = _title(page.id)
        for line in page.lines.split("\n"):
            number, _, rest = line.partition("\t")
            sentence = rest.split("\t")[0].strip()
            if number.isdigit() and sentence:
                yield Passage(f"{page.id}#{number}", sentence, title, {"page": title})


def _question(record: _Record) -> Question:
    places = [
        (page, sentence)
        for group in record.evidence
        for _, _, page, sentence in group
        if page is not None and sentence is not None
    ]
    return Question(
        str(record.id),
        "fever",
        record.claim,
        answers=distinct([record.label]),
        gold=distinct([f"{page}#{sentence}" for page, sentence in places]),
        pages=distinct([_title(page) for page, _ in places]),
        label=record.label,
    )


def _title(page: str) -> str:
    for code, bracket in _BRACKETS.items():
        page = page.replace(code, bracket)
    return page.replace("_", " ")
