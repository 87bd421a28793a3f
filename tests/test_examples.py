"""Each example, run on the tiny model as its first line says."""

import runpy
import sys
from pathlib import Path

import pytest

from cosup import CoSupModel, build_index
from cosup.data import Passage, Question, write_records

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_tells_what_was_asked(
    example: Path,
    tiny_folder: Path,
    passages: list[Passage],
    questions: list[Question],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_records(tmp_path / "questions.jsonl", questions)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "norway.md").write_text("# Norway\n\nOslo is the capital of Norway.\n")
    build_index(passages, CoSupModel.load(tiny_folder), tmp_path / "index")
    given = {
        "MODEL": tiny_folder,
        "FOLDER": tmp_path / "notes",
        "INDEX": tmp_path / "index",
        "FILE": tmp_path / "questions.jsonl",
        "QUESTION": "What governs Norway?",
    }
    usage = example.read_text("utf-8").splitlines()[0].rstrip('"').split(f"{example.name} ")[1].split()
    monkeypatch.setattr(sys, "argv", [str(example), *(str(given[word]) for word in usage)])
    runpy.run_path(str(example), run_name="__main__")
    told = capsys.readouterr().out
    assert "[Norway, " in told or "Which city governs Norway?" in told
