"""The paper's own training data: a pickle of columns, read without running anything, and its JSON of passages."""

import io
import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

from cosup.config import UserError
from cosup.data.foreign import read_json
from cosup.data.records import Evidence, Example, Passage, Text

_COLUMNS = ("input", "output", "evidence")
_PROMPT = re.compile(r"(?s)(?:.*?## Input:\n\n)?(.*?)(?:## Output:\n\n)?\Z")


class _PlainUnpickler(pickle.Unpickler):
    """Admits dicts, lists, tuples, sets, strings, bytes, numbers, booleans and None, which need no class."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to an object outside of the file")


def read_paper(path: Path, passages: Path) -> tuple[list[Passage], list[Example]]:
    """Reads the training data of the paper's authors.

    Args:
        path: their pickle: a dict of the columns `input`, `output` and `evidence`. In an output, `[k_<id>]` opens a
            retrieval, the passage follows, then `[Cs]`, the claim and `[Ce]`.
        passages: their JSON object that gives the text of each `[k_<id>]`.

    Returns:
        The passages that are cited, and the examples, task `paper`. A title before ` :: ` becomes the passage's.

    Raises:
        UserError: a file can't be read or is not of this form, a passage is missing, or the pickle holds anything
            but plain containers, which could run code.
    """
    columns = _plain_pickle(path)
    texts = read_json(passages, dict[str, str], name="a JSON object of passages")
    if not isinstance(columns, dict) or any(not isinstance(columns.get(name), list) for name in _COLUMNS):
        raise UserError(f"{path} is not the paper's training data: it must be a dict with the lists {_COLUMNS}")
    rows = list(zip(*(columns[name] for name in _COLUMNS), strict=False))
    if len({len(columns[name]) for name in _COLUMNS}) > 1:
        raise UserError(f"{path} is damaged: its columns differ in length")
    cited: dict[str, Passage] = {}
    examples = [_example(path, number, row, texts, cited) for number, row in enumerate(rows)]
    return list(cited.values()), examples


def _plain_pickle(path: Path) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as e:
        raise UserError(f"{path} can't be read ({e.strerror}); name the paper's training pickle") from None
    except Exception as e:  # a damaged pickle can raise almost anything
        raise UserError(
            f"{path} is not a pickle of plain containers ({e}), and nothing else is read, because it could run code"
        ) from None


def _example(path: Path, number: int, row: Any, texts: dict[str, str], cited: dict[str, Passage]) -> Example:
    asked, output, evidence = row
    if not isinstance(asked, str) or not isinstance(output, str) or not isinstance(evidence, list | tuple):
        raise UserError(f"{path}: row {number} is not a question, an output and a list of evidence")
    found = _PROMPT.match(asked)
    question = (found.group(1) if found else asked).strip()
    for id in map(str, evidence):
        if f"[k_{id}]" not in texts:
            raise UserError(f"{path}: row {number} cites [k_{id}], which the file of passages does not hold")
        cited[f"k_{id}"] = _passage(f"k_{id}", texts[f"[k_{id}]"])
    return Example(f"paper-{number}", "paper", question or asked, _response(output, set(map(str, evidence))))


def _response(output: str, evidence: set[str]) -> tuple[Text | Evidence, ...]:
    marks = "|".join(re.escape(id) for id in sorted(evidence, key=len, reverse=True))
    if not marks:
        return (Text(output.strip()),)
    retrieval = re.compile(rf"(?s)\[k_({marks})\](?:.*?\[Cs\])?(.*?)(?:\[Ce\]|(?=\[k_)|\Z)")
    parts: list[Text | Evidence] = []
    end = 0
    for match in retrieval.finditer(output):
        if text := output[end : match.start()].strip():
            parts.append(Text(text))
        parts.append(Evidence(f"k_{match.group(1)}", match.group(2).strip()))
        end = match.end()
    if text := output[end:].strip():
        parts.append(Text(text))
    return tuple(parts)


def _passage(id: str, text: str) -> Passage:
    title, colons, rest = text.partition(" :: ")
    return Passage(id, rest.strip(), title.strip()) if colons and rest.strip() else Passage(id, text.strip() or id)
