"""KILT: task files with provenance, and the knowledge source that it points into."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cosup.data.foreign import Part, distinct, read_json_lines, refuse_repeated
from cosup.data.records import Passage, Question

_TASKS = {
    "fever": "fever",
    "nq": "nq",
    "triviaqa": "triviaqa",
    "hotpotqa": "hotpotqa",
    "structured_zeroshot": "zsre",
    "zsre": "zsre",
    "trex": "trex",
    "wow": "wow",
    "eli5": "eli5",
}
_HEADINGS = ("Section::::", "BULLET::::")


class _Provenance(Part):
    wikipedia_id: str
    start_paragraph_id: int | None = None


class _Output(Part):
    answer: str = ""
    provenance: list[_Provenance] = Field(default_factory=list)


class _Record(Part):
    id: str | int
    input: Annotated[str, Field(min_length=1)]
    output: list[_Output] = Field(default_factory=list)


class _Page(Part):
    wikipedia_id: str
    wikipedia_title: str
    text: list[str]


def is_kilt(record: object) -> bool:
    """Whether a JSON line looks like a record of a KILT task."""
    return isinstance(record, dict) and {"id", "input"} <= record.keys() and ("output" in record or "meta" in record)


def kilt_task(path: Path) -> str:
    """Which task a file is of, by the beginning of its name (`nq-dev-kilt.jsonl`); else `kilt`."""
    return next((task for start, task in _TASKS.items() if path.name.lower().startswith(start)), "kilt")


def read_kilt(path: Path, *, task: str | None = None) -> list[Question]:
    """Reads a task file of KILT.

    Args:
        path: JSON Lines.
        task: of all of its questions; by the file's name without it.

    Returns:
        The questions. `gold` are the paragraphs of the provenance, as `read_kilt_pages` names them
        (`<wikipedia_id>#<paragraph>`), `pages` their pages. ELI5's answers are long answers. Test files have neither.

    Raises:
        UserError: the file can't be read, is not of this form, or an id occurs twice.

    Source:
        KILT (Petroni et al., NAACL 2021).
    """
    of = task or kilt_task(path)
    records = (record for _, record in read_json_lines(path, _Record, name="KILT JSON Lines"))
    return refuse_repeated(path, [_question(record, of) for record in records])


def read_kilt_pages(path: Path) -> Iterator[Passage]:
    """The paragraphs of KILT's knowledge source, one passage each, in order.

    The title and the headings, which the source counts as paragraphs too, are left out. `meta.page` is the page's id.

    Raises:
        UserError: as `read_kilt`.
    """
    for _, page in read_json_lines(path, _Page, name="KILT's knowledge source"):
        for number, paragraph in enumerate(page.text):
            text = paragraph.strip()
            if number and text and not text.startswith(_HEADINGS):
                yield Passage(f"{page.wikipedia_id}#{number}", text, page.wikipedia_title, {"page": page.wikipedia_id})


def _question(record: _Record, task: str) -> Question:
    answers = distinct([output.answer.strip() for output in record.output])
    provenance = [place for output in record.output for place in output.provenance]
    gold = [f"{p.wikipedia_id}#{p.start_paragraph_id}" for p in provenance if p.start_paragraph_id is not None]
    return Question(
        str(record.id),
        task,
        record.input.strip() or record.input,
        answers=[] if task == "eli5" else answers,
        long_answers=answers if task == "eli5" else [],
        gold=distinct(gold),
        pages=distinct([place.wikipedia_id for place in provenance]),
        label=answers[0] if task == "fever" and answers else "",
    )
