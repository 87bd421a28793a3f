"""SQuAD v1.1 and v2.0 JSON: paragraphs become passages, and the questions asked of them cite them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, model_validator

from cosup.config import UserError
from cosup.data.foreign import passage_id
from cosup.data.records import Passage, Question

_HEAD_BYTES = 4096
_SCALAR = rb'(?:"[^"]*"|[\w.+-]+)'
_HEAD = re.compile(rb'\s*\{\s*(?:"[^"]*"\s*:\s*' + _SCALAR + rb'\s*,\s*)*"data"\s*:\s*\[')

_Filled = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Part(BaseModel):
    """A part of the file; keys that are not read, such as `version` and `answer_start`, may be anything."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _Answer(_Part):
    text: _Filled


class _QA(_Part):
    id: _Filled
    question: _Filled
    answers: list[_Answer]
    is_impossible: bool = False

    @model_validator(mode="after")
    def _has_an_answer_unless_it_says_so(self) -> Self:
        if not self.answers and not self.is_impossible:
            raise ValueError("answers is empty, and is_impossible does not say that there is none")
        return self


class _Paragraph(_Part):
    context: _Filled
    qas: list[_QA]


class _Article(_Part):
    title: str
    paragraphs: list[_Paragraph]


class _File(_Part):
    data: list[_Article]


def is_squad(path: Path) -> bool:
    """Says whether a file looks like SQuAD JSON: `.json`, an object whose key `data` is a list.

    Only the first 4 KiB are read, so `data` must be the first key or follow plain values such as `version`.

    Args:
        path: any path; one that is no file is not SQuAD.

    Returns:
        Whether `read_squad` should be tried on it.
    """
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return _HEAD.match(file.read(_HEAD_BYTES)) is not None


def read_squad(path: Path) -> tuple[list[Passage], list[Question]]:
    """Reads a SQuAD v1.1 or v2.0 file.

    A passage's id is `p-` and the first 12 hex digits of sha1(title, newline, text); a paragraph that occurs twice
    is one passage.

    Args:
        path: a JSON file.

    Returns:
        The passages, one a paragraph, titled as the article is (`Beyonc%C3%A9_Knowles` is `Beyoncé Knowles`); and the
        questions, task `squad`, each with its distinct answers in order and its paragraph as gold. An unanswerable
        one of v2.0 has neither: its label is `unanswerable`, and its paragraph a negative.

    Raises:
        UserError: no such file, not JSON, not of this form, or a question's id occurs twice.

    Source:
        SQuAD: 100,000+ Questions for Machine Comprehension of Text (Rajpurkar et al., EMNLP 2016); Know What You
        Don't Know (Rajpurkar et al., ACL 2018).
    """
    passages: dict[str, Passage] = {}
    questions: dict[str, Question] = {}
    for article in _parse(path).data:
        title = unquote(article.title).replace("_", " ")
        for paragraph in article.paragraphs:
            passage = Passage(passage_id(title, paragraph.context), paragraph.context, title)
            passages[passage.id] = passage
            for question in _questions(paragraph, passage):
                if question.id in questions:
                    raise UserError(f"{path}: the question id {question.id!r} occurs twice; ids must be unique")
                questions[question.id] = question
    return list(passages.values()), list(questions.values())


def _questions(paragraph: _Paragraph, passage: Passage) -> Iterator[Question]:
    for qa in paragraph.qas:
        asked = " ".join(qa.question.split())
        if qa.is_impossible:
            yield Question(qa.id, "squad", asked, negatives=[passage.id], label="unanswerable")
            continue
        answers = list(dict.fromkeys(answer.text for answer in qa.answers))
        yield Question(qa.id, "squad", asked, answers=answers, gold=[passage.id])


def _parse(path: Path) -> _File:
    try:
        return _File.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; name a SQuAD JSON file") from None
    except OSError as e:
        raise UserError(f"{path} can't be read: {e.strerror}; name a SQuAD JSON file") from None
    except ValidationError as e:
        raise UserError(f"{path} is not SQuAD JSON: {_reason(e)}") from None


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "json_invalid":
        return f"{first['msg']}; unpack or download it again"
    if first["type"] == "missing":
        return f"{place} is missing; add it, or take the paragraph or question out"
    if first["type"] == "value_error":
        return f"{place}: {first['msg'].removeprefix('Value error, ')}"
    return f"{place} is {first['input']!r:.60}, but the {first['msg'][:1].lower() + first['msg'][1:]}"
