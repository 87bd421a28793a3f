"""MAUVE with the tiny model's states; where the package is absent, only what then holds."""

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from cosup.config import UserError
from cosup.data import Question, write_records
from cosup.engine import Options
from cosup.evaluate import RunSettings, evaluate_tasks, read_tasks
from cosup.evaluate.fluency import mauve
from cosup.index import build_index
from cosup.model import CoSupModel

needs_mauve = pytest.mark.skipif(importlib.util.find_spec("mauve") is None, reason="mauve-text is not installed")

PEOPLE = [f"Oslo is the capital of Norway, and it has number {n}." for n in range(24)]
OTHERS = [f"{n} {n} {n} :: :: [SEP] {n} {n}" for n in range(24)]


@needs_mauve
def test_texts_of_the_same_kind_are_nearer_than_texts_of_another(tiny_lm: Path) -> None:
    same = mauve(PEOPLE, PEOPLE, str(tiny_lm))
    other = mauve(OTHERS, PEOPLE, str(tiny_lm))
    assert 0.0 <= other < 0.5 < same <= 1.0
    assert same == pytest.approx(1.0, abs=0.02)


@needs_mauve
def test_it_is_the_same_each_time_and_leaves_the_random_state_of_others_alone(tiny_lm: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = mauve(PEOPLE[:12], OTHERS[:12], str(tiny_lm))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert mauve(PEOPLE[:12], OTHERS[:12], str(tiny_lm)) == first


@needs_mauve
def test_a_run_has_the_figure_only_where_a_model_is_named(
    tiny: CoSupModel, tiny_lm: Path, passages: list, tmp_path: Path
) -> None:
    asked = [Question(f"q{n}", "eli5", f"Why {n}?", long_answers=[text]) for n, text in enumerate(PEOPLE)]
    write_records(tmp_path / "eli5.jsonl", asked)
    tasks = read_tasks([str(tmp_path / "eli5.jsonl")])
    index = build_index(passages, tiny, tmp_path / "index")
    options = Options(max_new_tokens=4)
    plain = evaluate_tasks(tiny, index, tasks, tmp_path / "run", settings=RunSettings(options=options))["eli5"]
    assert "mauve" not in plain.figures
    settings = RunSettings(options=options, mauve_model=str(tiny_lm))
    figure = evaluate_tasks(tiny, index, tasks, tmp_path / "run", settings=settings)["eli5"].figures["mauve"]
    assert figure.count == 24
    assert figure.value is not None
    assert 0.0 <= figure.value <= 1.0


def test_without_its_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(UserError, match=r"pip install 'cosup\[eval\]'"):
        mauve(PEOPLE, PEOPLE, "any")


@needs_mauve
def test_a_model_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MAUVE's model"):
        mauve(PEOPLE, PEOPLE, str(tmp_path / "nowhere"))
