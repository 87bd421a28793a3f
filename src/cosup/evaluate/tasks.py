"""The paper's ten data sets by name, any file of questions, and what each is headed by."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cosup.config import UserError
from cosup.data import Question
from cosup.data.formats import read_any

_SUFFIXES = (".jsonl.gz", ".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class Headline:
    """What a report shows first of a data set.

    Args:
        title: its name as people write it.
        correctness: figures of correctness, of which the first that was measured is shown.
    """

    title: str
    correctness: tuple[str, ...] = ("answer_in_text",)


HEADLINES = {
    "squad": Headline("SQuAD"),
    "fever": Headline("FEVER", ("label_accuracy",)),
    "nq": Headline("NQ"),
    "triviaqa": Headline("TriviaQA"),
    "hotpotqa": Headline("HotpotQA"),
    "zsre": Headline("zsRE"),
    "trex": Headline("T-REx"),
    "wow": Headline("WoW", ("token_f1_text",)),
    "eli5": Headline("ELI5", ("claim_recall", "rouge_l")),
    "asqa": Headline("ASQA", ("string_em",)),
}
"""ELI5 is one name for KILT's and for ALCE's, which alone has claims."""


@dataclass(frozen=True, slots=True)
class Task:
    """A data set to evaluate on.

    Args:
        name: of its folder in the results.
        path: its file.
        questions: all of them.
    """

    name: str
    path: Path
    questions: tuple[Question, ...]


def read_tasks(names: Sequence[str], *, data: Path | None = None, limit: int | None = None) -> list[Task]:
    """Reads data sets.

    Args:
        names: files in any format that `cosup.data.formats` knows, or names of files in `data`, with commas between.
        data: the folder of those that are no files themselves.
        limit: only the first so many questions of each.

    Raises:
        UserError: a file does not exist, can't be read, holds no questions, or two have the same name.
    """
    tasks: list[Task] = []
    for name in (part.strip() for given in names for part in given.split(",")):
        if not name:
            continue
        path = _find(name, data)
        questions = read_any(path).questions[:limit]
        if not questions:
            raise UserError(f"{path} holds no questions to ask")
        tasks.append(Task(path.name.split(".")[0], path, tuple(questions)))
    repeated = {task.name for task in tasks if sum(task.name == other.name for other in tasks) > 1}
    if repeated:
        raise UserError(f"two files are called {sorted(repeated)[0]!r}, and would share a folder; rename one of them")
    if not tasks:
        raise UserError("there is no data set to evaluate on: name one with --tasks")
    return tasks


def _find(name: str, data: Path | None) -> Path:
    path = Path(name)
    if path.is_file() or data is None:
        if not path.is_file():
            raise UserError(f"there is no file {name}; name one, or give the folder of the data set with --data")
        return path
    for folder in (data, data / "dev"):
        for suffix in _SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    raise UserError(f"there is no data set {name!r} in {data} or {data / 'dev'}, with a name such as {name}.jsonl.gz")
