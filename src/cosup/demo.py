"""The whole method on a real small model in one command: data, before, training, index, after, answers."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cosup.config import Recipe, UserError, parse_recipe
from cosup.data import Passage, Question, read_passages, read_questions
from cosup.data.worldfacts import build_worldfacts
from cosup.engine import Options
from cosup.evaluate import Evaluation, evaluate_model
from cosup.index import FaissIndex, build_index
from cosup.model import CoSupModel
from cosup.train import train_recipe

QUESTIONS = 200
"""How many questions of the test split the two evaluations ask; the same ones, the first of the file."""

OPTIONS = Options(max_new_tokens=32)

Counter = Callable[[str, int, str], Any]
"""Called with what is counted, how many there will be and their unit; a context manager that gives an `on_progress`."""


def demo_recipe(folder: Path, minutes: float) -> Recipe:
    """The demo's training: worldfacts, co-supervised, for so many minutes."""
    return parse_recipe(
        {
            "name": "demo",
            "data": {"folder": str(folder), "train": ["train.jsonl"], "passages": ["passages.jsonl"]},
            "train": {
                "max_minutes": minutes,
                "learning_rate": 3e-4,
                "epochs": 3,
                "neighbours": 4,
            },
        }
    )


class Demo:
    """The steps of `cosup demo`, each of which leaves its result in the folder and is not done twice.

    Args:
        folder: where everything is kept.
        minutes: training budget.
        counter: shows progress.
    """

    def __init__(self, folder: Path, *, minutes: float, counter: Counter):
        self.folder, self.minutes, self._counter = folder, minutes, counter
        self.data, self.run = folder / "worldfacts", folder / "run"

    def start_over(self) -> None:
        """Removes what earlier demos left; refuses a folder that is not a demo's."""
        if not self.folder.exists():
            return
        if any(self.folder.iterdir()) and not (self.folder / "worldfacts").is_dir():
            raise UserError(f"{self.folder} is not the folder of a demo, so it is not removed; name another with --out")
        shutil.rmtree(self.folder)

    def build_data(self) -> None:
        """Writes worldfacts."""
        if not (self.data / "passages.jsonl").is_file():
            build_worldfacts(self.data)

    def before(self) -> Evaluation:
        """The untrained model on the test questions."""
        saved = self.folder / "before"
        if (evaluation := _load(saved)) is not None:
            return evaluation
        untrained = self.folder / "untrained"
        if not (untrained / "cosup.json").is_file():
            CoSupModel.start(demo_recipe(self.data, self.minutes).model).save(untrained)
        evaluation = self._judge(untrained, self.folder / "untrained-index")
        evaluation.save(saved)
        shutil.rmtree(untrained)
        shutil.rmtree(self.folder / "untrained-index")
        return evaluation

    def train(self, **display: Any) -> None:
        """Co-supervises; `display` goes to `train_recipe`."""
        train_recipe(demo_recipe(self.data, self.minutes), self.run, **display)

    def after(self) -> Evaluation:
        """The trained model on the same questions."""
        saved = self.folder / "after"
        if (evaluation := _load(saved)) is not None:
            return evaluation
        evaluation = self._judge(self.run, self.folder / "index")
        evaluation.save(saved)
        return evaluation

    def shown(self) -> list[Question]:
        """Five test questions: one of each kind, and one more."""
        questions = list(read_questions(self.data / "test.jsonl"))[QUESTIONS:]
        kinds = ("worldfacts-qa", "worldfacts-slot", "worldfacts-hop", "worldfacts-claim")
        first = [next(question for question in questions if question.task == kind) for kind in kinds]
        return [*first, next(q for q in questions if q.task == "worldfacts-qa" and q not in first)]

    def _judge(self, model_folder: Path, index_folder: Path) -> Evaluation:
        model = CoSupModel.load(model_folder)
        index = self._index(model, index_folder)
        questions = list(read_questions(self.data / "test.jsonl"))[:QUESTIONS]
        with self._counter("asking", len(questions), "questions") as on_progress:
            return evaluate_model(model, index, questions, options=OPTIONS, on_progress=on_progress)

    def _index(self, model: CoSupModel, folder: Path) -> FaissIndex:
        with suppress(UserError):  # none yet, or an older version's: built again
            index = FaissIndex(folder)
            if index.fingerprint == model.fingerprint:
                return index
        passages: Sequence[Passage] = list(read_passages(self.data / "passages.jsonl"))
        with self._counter("indexing", len(passages), "passages") as on_progress:
            return build_index(passages, model, folder, on_progress=on_progress)


def _load(folder: Path) -> Evaluation | None:
    return Evaluation.load(folder) if (folder / "figures.json").is_file() else None
