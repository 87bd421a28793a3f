"""ALCE's evaluation JSON: ASQA and ELI5, each question with the passages that it may choose from."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from cosup.config import UserError
from cosup.data.foreign import Part, distinct, gather, passage_id, read_json
from cosup.data.records import Passage, QAPair, Question


class _Doc(Part):
    title: str = ""
    text: Annotated[str, Field(min_length=1)]


class _Pair(Part):
    question: str = ""
    short_answers: list[str] = Field(default_factory=list)


class _Annotation(Part):
    long_answer: str = ""


class _Record(Part):
    question: Annotated[str, Field(min_length=1)]
    sample_id: str | None = None
    answer: str = ""
    claims: list[str] = Field(default_factory=list)
    qa_pairs: list[_Pair] | None = None
    annotations: list[_Annotation] | None = None
    docs: list[_Doc] = Field(default_factory=list)


def read_alce(path: Path) -> tuple[list[Passage], list[Question]]:
    """Reads an evaluation file of ALCE.

    Args:
        path: a JSON list; `docs` may be absent.

    Returns:
        The distinct passages of all `docs`, and the questions: task `asqa` where there are `qa_pairs`, else `eli5`.
        `candidates` are the question's own docs, in order. A question without `sample_id` is named after its text.

    Raises:
        UserError: the file can't be read, is not of this form, or an id occurs twice.

    Source:
        ALCE (Gao et al., EMNLP 2023).
    """
    passages, questions = gather(path, map(_part, read_json(path, list[_Record], name="ALCE's JSON")))
    if not questions:
        raise UserError(f"{path} holds no question; name another file")
    return passages, questions


def _part(record: _Record) -> tuple[list[Passage], list[Question]]:
    docs = [Passage(passage_id(doc.title, doc.text), doc.text, doc.title) for doc in record.docs]
    pairs = [QAPair(pair.question, distinct(pair.short_answers)) for pair in record.qa_pairs or ()]
    annotated = [annotation.long_answer for annotation in record.annotations or ()]
    question = Question(
        record.sample_id or passage_id("", record.question).replace("p-", "q-"),
        "asqa" if pairs else "eli5",
        record.question,
        answers=distinct([answer for pair in pairs for answer in pair.short_answers]),
        long_answers=distinct([*annotated, record.answer]),
        claims=distinct(record.claims),
        qa_pairs=pairs,
        candidates=distinct([doc.id for doc in docs]),
    )
    return docs, [question]
