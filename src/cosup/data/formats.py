"""Which format a file is in, and reading it whatever it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cosup.config import UserError
from cosup.data.alce import read_alce
from cosup.data.fever import is_fever, read_fever
from cosup.data.foreign import first_json_line
from cosup.data.hotpotqa import read_hotpotqa
from cosup.data.kilt import is_kilt, read_kilt
from cosup.data.paper import read_paper
from cosup.data.records import Example, Passage, Question, read_questions
from cosup.data.selfrag import is_selfrag, read_selfrag
from cosup.data.squad import is_squad, read_squad

Format = Literal["cosup", "squad", "kilt", "alce", "hotpotqa", "fever", "selfrag", "paper"]

_HEAD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Foreign:
    """What a file gave.

    Args:
        passages: those that it brings itself.
        questions: empty where it holds examples.
        examples: of training data, whose responses are given.
    """

    passages: list[Passage]
    questions: list[Question]
    examples: list[Example]


def format_of(path: Path) -> Format:
    """Tells the format of a file by its name and its beginning; `cosup` where it is none of the others."""
    if path.suffix in (".pickle", ".pkl"):
        return "paper"
    if is_squad(path):
        return "squad"
    if path.suffix == ".json":
        return _json_format(path)
    record = first_json_line(path)
    if is_fever(record):
        return "fever"
    if is_selfrag(record):
        return "selfrag"
    return "kilt" if is_kilt(record) else "cosup"


def read_any(path: Path, *, texts: Path | None = None) -> Foreign:
    """Reads a file of questions or training data in any format that `format_of` knows.

    Args:
        path: the file.
        texts: the paper's JSON of passages, which its pickle needs.

    Raises:
        UserError: as the format's own reader.
    """
    match format_of(path):
        case "squad":
            return Foreign(*read_squad(path), [])
        case "alce":
            return Foreign(*read_alce(path), [])
        case "hotpotqa":
            return Foreign(*read_hotpotqa(path), [])
        case "kilt":
            return Foreign([], read_kilt(path), [])
        case "fever":
            return Foreign([], read_fever(path), [])
        case "selfrag":
            passages, examples = read_selfrag(path)
            return Foreign(passages, [], examples)
        case "paper":
            if texts is None:
                raise UserError(f"{path} names its passages by number only; give their JSON with --texts")
            passages, examples = read_paper(path, texts)
            return Foreign(passages, [], examples)
        case "cosup":
            return Foreign([], list(read_questions(path)), [])


def _json_format(path: Path) -> Format:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return "cosup"
    if not head.lstrip().startswith(b"["):
        return "cosup"
    return "hotpotqa" if b'"supporting_facts"' in head or (b'"_id"' in head and b'"context"' in head) else "alce"
