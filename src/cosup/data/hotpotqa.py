"""HotpotQA JSON, distractor setting: each question with its ten paragraphs."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from cosup.data.foreign import Part, distinct, gather, passage_id, read_json
from cosup.data.records import Passage, Question


class _Record(Part):
    id: Annotated[str, Field(alias="_id", min_length=1)]
    question: Annotated[str, Field(min_length=1)]
    answer: str = ""
    supporting_facts: list[tuple[str, int]] = Field(default_factory=list, strict=False)
    context: Annotated[list[tuple[str, list[str]]], Field(min_length=1, strict=False)]


def read_hotpotqa(path: Path) -> tuple[list[Passage], list[Question]]:
    """Reads a HotpotQA file.

    Args:
        path: a JSON list; test files without answers and supporting facts are read too.

    Returns:
        The distinct paragraphs, and the questions: `gold` are the supporting paragraphs in the order of the
        annotation, `candidates` all of the question's own.

    Raises:
        UserError: the file can't be read, is not of this form, or an id occurs twice.

    Source:
        HotpotQA (Yang et al., EMNLP 2018).
    """
    return gather(path, map(_part, read_json(path, list[_Record], name="HotpotQA JSON")))


def _part(record: _Record) -> tuple[list[Passage], list[Question]]:
    own = {title: _passage(title, sentences) for title, sentences in record.context if "".join(sentences).strip()}
    question = Question(
        record.id,
        "hotpotqa",
        record.question,
        answers=distinct([record.answer]),
        gold=distinct([own[title].id for title, _ in record.supporting_facts if title in own]),
        candidates=distinct([passage.id for passage in own.values()]),
    )
    return list(own.values()), [question]


def _passage(title: str, sentences: list[str]) -> Passage:
    text = " ".join("".join(sentences).split())
    return Passage(passage_id(title, text), text, title)
