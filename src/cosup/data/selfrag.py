"""Self-RAG's training data: responses with passages and reflection tokens become examples."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cosup.data.foreign import Part, passage_id, read_json_lines
from cosup.data.records import Evidence, Example, Passage, Text

_PARAGRAPH = re.compile(r"<paragraph>(.*?)</paragraph>", re.S)
_REFLECTION = re.compile(
    r"\[(?:Retrieval|No Retrieval|Continue to Use Evidence|Relevant|Irrelevant|Fully supported|Partially supported"
    r"|No support / Contradictory|Utility:[1-5])\]"
)


class _Record(Part):
    id: str | int | None = None
    instruction: str = ""
    input: str = ""
    output: Annotated[str, Field(min_length=1)]
    dataset_name: str = ""


def is_selfrag(record: object) -> bool:
    """Whether a JSON line looks like Self-RAG's training data."""
    return isinstance(record, dict) and {"instruction", "output", "dataset_name"} <= record.keys()


def read_selfrag(path: Path) -> tuple[list[Passage], list[Example]]:
    """Reads Self-RAG's training data.

    A passage that the data judged relevant is evidence for the text that follows it; text after one that it judged
    irrelevant is kept as text without it. Reflection tokens are taken out.

    Args:
        path: JSON Lines.

    Returns:
        The distinct passages, and the examples, with the task `selfrag-<data set>` and the line in the id.

    Raises:
        UserError: the file can't be read, or is not of this form.

    Source:
        Self-RAG (Asai et al., ICLR 2024).
    """
    passages: dict[str, Passage] = {}
    examples = []
    for number, record in read_json_lines(path, _Record, name="Self-RAG's training data"):
        asked = "\n".join(part.strip() for part in (record.instruction, record.input) if part.strip())
        response = _response(record.output, passages)
        if asked and response:
            task = f"selfrag-{record.dataset_name}" if record.dataset_name else "selfrag"
            examples.append(Example(f"{number}-{record.id or task}", task, asked, response))
    return list(passages.values()), examples


def _response(output: str, passages: dict[str, Passage]) -> tuple[Text | Evidence, ...]:
    first, *rest = _PARAGRAPH.split(output)
    parts: list[Text | Evidence] = [Text(text)] if (text := _clean(first)) else []
    for paragraph, after in zip(rest[::2], rest[1::2], strict=True):
        text = _clean(after)
        if not text:
            continue
        if "[Irrelevant]" in after or not paragraph.strip():
            parts.append(Text(text))
            continue
        passage = _passage(paragraph)
        passages[passage.id] = passage
        parts.append(Evidence(passage.id, text))
    return tuple(parts)


def _clean(text: str) -> str:
    return " ".join(_REFLECTION.sub(" ", text).split())


def _passage(paragraph: str) -> Passage:
    title, newline, text = paragraph.strip().partition("\n")
    if not newline or not text.strip():
        title, text = "", paragraph
    title, text = " ".join(title.split()), " ".join(text.split())
    return Passage(passage_id(title, text), text, title)
