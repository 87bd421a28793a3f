"""SQuAD v1.1 and v2.0 JSON: paragraphs become passages, and the questions asked of them cite them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import unquote

from pydantic import StringConstraints, model_validator

from cosup.data.foreign import Part, gather, passage_id, read_json
from cosup.data.records import Passage, Question

_HEAD_BYTES = 4096
_SCALAR = rb'(?:"[^"]*"|[\w.+-]+)'
_HEAD = re.compile(rb'\s*\{\s*(?:"[^"]*"\s*:\s*' + _SCALAR + rb'\s*,\s*)*"data"\s*:\s*\[')

_Filled = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Answer(Part):
    text: _Filled


class _QA(Part):
    id: _Filled
    question: _Filled
    answers: list[_Answer]
    is_impossible: bool = False

    @model_validator(mode="after")
    def _has_an_answer_unless_it_says_so(self) -> Self:
        if not self.answers and not self.is_impossible:
            raise ValueError("answers is empty, and is_impossible does not say that there is none")
        return self


class _Paragraph(Part):
    context: _Filled
    qas: list[_QA]


class _Article(Part):
    title: str
    paragraphs: list[_Paragraph]


class _File(Part):
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
    read = read_json(path, _File, name="SQuAD JSON")
    return gather(path, (part for article in read.data for part in _paragraphs(article)))


def _paragraphs(article: _Article) -> Iterator[tuple[list[Passage], list[Question]]]:
    title = unquote(article.title).replace("_", " ")
    for paragraph in article.paragraphs:
        passage = Passage(passage_id(title, paragraph.context), paragraph.context, title)
        yield [passage], list(_questions(paragraph, passage))


def _questions(paragraph: _Paragraph, passage: Passage) -> Iterator[Question]:
    for qa in paragraph.qas:
        asked = " ".join(qa.question.split())
        if qa.is_impossible:
            yield Question(qa.id, "squad", asked, negatives=[passage.id], label="unanswerable")
            continue
        answers = list(dict.fromkeys(answer.text for answer in qa.answers))
        yield Question(qa.id, "squad", asked, answers=answers, gold=[passage.id])
