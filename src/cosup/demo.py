"""The whole method on a real small model in one command: data, answers, training on it, index, after, answers."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cosup.config import RELEASED, Recipe, UserError, parse_recipe
from cosup.data import Passage, Question, read_passages, read_questions
from cosup.data.worldfacts import build_worldfacts
from cosup.engine import Options
from cosup.evaluate import Evaluation, evaluate_model
from cosup.index import FaissIndex, build_index
from cosup.model import CoSupModel
from cosup.train import train_recipe

QUESTIONS = 200
"""How many questions of the test split the two evaluations ask; the same ones, the first of the file."""

OPTIONS = Options(max_new_tokens=32, quote=False, statements=False, hybrid=0.0)
"""By the model alone, whatever the one that it starts from comes with: what training did is to be seen."""

Counter = Callable[[str, int, str], Any]
"""Called with what is counted, how many there will be and their unit; a context manager that gives an `on_progress`."""


def demo_recipe(folder: Path, minutes: float, *, model: str = RELEASED) -> Recipe:
    """The demo's training: the adapters of a model go on, on worldfacts, co-supervised, for so many minutes."""
    return parse_recipe(
        {
            "name": "demo",
            "model": {"gen": model, "lora": {"rank": 16, "alpha": 32}},
            "data": {"folder": str(folder), "train": ["train.jsonl"], "passages": ["passages.jsonl"]},
            "train": {
                "max_minutes": minutes,
                "learning_rate": 1e-3,
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
        model: of adapters, to start from.
    """

    def __init__(self, folder: Path, *, minutes: float, counter: Counter, model: Path = Path(RELEASED)):
        self.folder, self.minutes, self.model, self._counter = folder, minutes, model, counter
        self.data, self.run = folder / "worldfacts", folder / "run"

    def start_over(self) -> None:
        """Removes what earlier demos left; refuses a folder that is not a demo's."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir() or (any(self.folder.iterdir()) and not (self.folder / "worldfacts").is_dir()):
            raise UserError(f"{self.folder} is not the folder of a demo, so it is not removed; name another with --out")
        shutil.rmtree(self.folder)

    def build_data(self) -> None:
        """Writes worldfacts."""
        if not (self.data / "passages.jsonl").is_file():
            build_worldfacts(self.data)

    def at_first(self) -> tuple[CoSupModel, FaissIndex]:
        """The model that the demo starts from, and its index of worldfacts."""
        model = CoSupModel.load(self.model)
        return model, self._index(model, self.folder / "first-index")

    def trained(self) -> tuple[CoSupModel, FaissIndex]:
        """The same after `train`."""
        model = CoSupModel.load(self.run)
        return model, self._index(model, self.folder / "index")

    def before(self) -> Evaluation:
        """The model of `at_first` on the test questions."""
        return self._judged(self.folder / "before", self.at_first)

    def train(self, **display: Any) -> None:
        """Co-supervises; `display` goes to `train_recipe`."""
        train_recipe(demo_recipe(self.data, self.minutes, model=str(self.model)), self.run, **display)

    def after(self) -> Evaluation:
        """The model of `trained` on the same questions."""
        return self._judged(self.folder / "after", self.trained)

    def shown(self) -> list[Question]:
        """Five test questions: one of each kind, and one more."""
        questions = list(read_questions(self.data / "test.jsonl"))[QUESTIONS:]
        kinds = ("worldfacts-qa", "worldfacts-slot", "worldfacts-hop", "worldfacts-claim")
        first = [next(question for question in questions if question.task == kind) for kind in kinds]
        return [*first, next(q for q in questions if q.task == "worldfacts-qa" and q not in first)]

    def _judged(self, saved: Path, opened: Callable[[], tuple[CoSupModel, FaissIndex]]) -> Evaluation:
        if (saved / "figures.json").is_file():
            return Evaluation.load(saved)
        model, index = opened()
        questions = list(read_questions(self.data / "test.jsonl"))[:QUESTIONS]
        with self._counter("asking", len(questions), "questions") as on_progress:
            evaluation = evaluate_model(model, index, questions, options=OPTIONS, on_progress=on_progress)
        evaluation.save(saved)
        return evaluation

    def _index(self, model: CoSupModel, folder: Path) -> FaissIndex:
        with suppress(UserError):  # none yet, or an older version's: built again
            index = FaissIndex(folder)
            if index.fingerprint == model.fingerprint:
                return index
        passages: Sequence[Passage] = list(read_passages(self.data / "passages.jsonl"))
        with self._counter("indexing", len(passages), "passages") as on_progress:
            return build_index(passages, model, folder, on_progress=on_progress)
