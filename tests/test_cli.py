import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from cosup.cli import app, main
from cosup.data import Example, Passage, Question, read_examples, read_passages, write_records
from cosup.index import FaissIndex, build_index
from cosup.model import CoSupModel


def run(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "cosup.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def refuse(*arguments: object) -> str:
    """The one sentence that a user error prints, without a traceback."""
    done = run(*arguments, expect=2)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def refuse_here(*arguments: object) -> str:
    """As `refuse`, in this process: what only needs the messages is sooner done."""
    told = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["cosup", *map(str, arguments)]),
        redirect_stdout(io.StringIO()),
        redirect_stderr(told),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert ended.value.code == 2
    (line,) = told.getvalue().splitlines()
    return line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture
def files(tmp_path: Path, passages: list[Passage], questions: list[Question], tiny_folder: Path) -> Path:
    """A folder with passages, questions, and an index of the tiny model."""
    write_records(tmp_path / "passages.jsonl", passages)
    write_records(tmp_path / "questions.jsonl", questions)
    build_index(passages, CoSupModel.load(tiny_folder), tmp_path / "index")
    return tmp_path


def test_help_and_import_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, cosup, cosup.cli; from typer.testing import CliRunner; "
        "result = CliRunner().invoke(cosup.cli.app, ['--help']); assert result.exit_code == 0, result.output; "
        "assert 'train' in result.output; "
        "print([name for name in ('torch', 'transformers', 'faiss', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_train_index_ask_generate_and_evaluate_work_in_a_row(files: Path, tiny_lm: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: tiny\nmodel: {{gen: {tiny_lm}}}\n"
        f"data: {{folder: {files}, train: [questions.jsonl], passages: [passages.jsonl]}}\n"
        "train: {batch_size: 2, max_steps: 3, log_steps: 1, dtype: float32}\n"
    )
    trained, index = tmp_path / "run", tmp_path / "new-index"
    done = run("train", recipe, "--out", trained, "--set", "train.max_steps=2")
    assert "objective" in done.stdout
    assert "nsp" in done.stderr
    assert "step 2" in done.stderr

    run("index", "build", "--model", trained, "--passages", files / "passages.jsonl", "--out", index)
    found = run("index", "search", "gold", "--model", trained, "--index", index, "--top", "3").stdout
    assert found.count("\n") >= 6

    streamed = run(
        "ask", "gold?", "--model", trained, "--index", index, "--retrieve-first", "--max-new-tokens", "5"
    ).stdout
    assert "⟨retrieves⟩" in streamed
    assert "[1]" in streamed
    whole = json.loads(
        run(
            "ask", "gold?", "--model", trained, "--index", index, "--json", "--retrieve-first", "--max-new-tokens", "5"
        ).stdout
    )
    assert whole["question"] == "gold?"
    assert whole["claims"][0]["passage"] == whole["passages"][0]["id"]

    none = run("ask", "gold?", "--model", trained, "--index", index, "--retrieve-first", "--min-score", "2",
               "--max-new-tokens", "3", "--temperature", "0.7", "--top-k", "5", "--seed", "1",
               "--stop", "zzz")  # fmt: skip
    assert "found nothing good enough" in none.stderr

    answers = tmp_path / "answers.jsonl"
    run("generate", "--input", files / "questions.jsonl", "--output", answers, "--model", trained, "--index", index,
        "--max-new-tokens", "5", "--mode", "static", "--forget-passages", "--rows", "2")  # fmt: skip
    assert [json.loads(line)["id"] for line in answers.read_text().splitlines()] == ["q0", "q1", "q2", "q3"]

    table = run("evaluate", "--model", trained, "--index", index, "--questions", files / "questions.jsonl",
                "--max-new-tokens", "5").stdout  # fmt: skip
    assert "retrieval success@1, forced" in table
    assert (trained / "evaluations" / "questions" / "figures.json").is_file()


def test_documents_become_passages_an_index_and_an_answer(files: Path, tiny_folder: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "norway.md").write_text("# Norway\n\nOslo is the capital. [Ret] and [Cs] are only text here.\n")
    (notes / "gold.txt").write_text("Gold has the atomic number 79.\n")
    run("ingest", notes, "--out", tmp_path / "mine.jsonl")
    assert {passage.title for passage in read_passages(tmp_path / "mine.jsonl")} == {"Norway", "gold"}
    run("index", "build", "--model", tiny_folder, "--passages", tmp_path / "mine.jsonl", "--out", tmp_path / "mine")
    asked = run("ask", "gold [Ret]?", "--model", tiny_folder, "--index", tmp_path / "mine", "--retrieve-first",
                "--max-new-tokens", "4").stdout  # fmt: skip
    assert "[1]" in asked


def test_an_index_can_be_restricted_to_the_passages_that_questions_cite(files: Path, tiny_folder: Path) -> None:
    run("index", "build", "--model", tiny_folder, "--passages", files / "passages.jsonl", "--out", files / "cited",
        "--cited-by", files / "questions.jsonl")  # fmt: skip
    assert json.loads((files / "cited" / "index.json").read_text())["count"] == 5


def test_data_check_names_file_and_line_of_every_problem(files: Path) -> None:
    run("data", "check", files / "passages.jsonl", files / "questions.jsonl")
    bad = files / "bad.jsonl"
    bad.write_bytes(b'{"id": "a", "text": "x"}\n{"id": "a"}\n{"id": "b", "text": "\xff"}\n')
    done = run("data", "check", bad, expect=2)
    assert f"{bad}:2: the key 'text' is missing" in done.stdout
    assert f"{bad}:3: not UTF-8" in done.stdout
    assert "error: 2 problems in 1 file" in done.stderr


def test_questions_and_squad_become_examples(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "examples.jsonl"
    run("data", "convert", files / "questions.jsonl", "--passages", files / "passages.jsonl", "--out", out)
    assert [len(example.evidence) for example in read_examples(out)] == [1, 1, 1, 2]
    squad = tmp_path / "squad.json"
    qas = [{"id": "1", "question": "Where?", "answers": [{"text": "Oslo", "answer_start": 3}]}]
    squad.write_text(
        json.dumps({"version": "1.1", "data": [{"title": "A", "paragraphs": [{"context": "In Oslo.", "qas": qas}]}]})
    )
    run("data", "convert", squad, "--passages", tmp_path / "squad.jsonl", "--out", out)
    assert next(iter(read_examples(out))).evidence[0].claim == "Oslo"
    assert "exists" in refuse("data", "convert", squad, "--passages", tmp_path / "squad.jsonl", "--out", out)


def test_worldfacts_is_built_once(tmp_path: Path) -> None:
    run("data", "build", "worldfacts", "--out", tmp_path / "facts")
    assert len(list(read_passages(tmp_path / "facts" / "passages.jsonl"))) >= 1500
    assert "is not empty" in refuse("data", "build", "worldfacts", "--out", tmp_path / "facts")
    assert "no built-in data set 'nothing'" in refuse("data", "build", "nothing", "--out", tmp_path / "x")


def test_bad_input_is_one_sentence_and_exit_code_2(files: Path, tiny_folder: Path, tmp_path: Path) -> None:
    missing, recipe = tmp_path / "missing", tmp_path / "r.yaml"
    assert "there is no recipe at" in refuse("train", missing)
    recipe.write_text("name: x\ndata: {train: [a], passages: [b]}\ntrain: {learning_rat: 1}\n")
    assert "unknown key 'train.learning_rat'; the nearest valid one is 'train.learning_rate'" in refuse("train", recipe)
    assert "there is no model at" in refuse("ask", "x", "--model", missing, "--index", files / "index")
    assert "there is no index at" in refuse("ask", "x", "--model", tiny_folder, "--index", missing)
    assert "there is no file" in refuse(
        "index", "build", "--model", tiny_folder, "--passages", missing, "--out", missing
    )
    wrong = refuse("ask", "x", "--model", tiny_folder, "--index", files / "index", "--top-p", "2")
    assert "top_p must be above 0 and at most 1, not 2.0" in wrong
    long = refuse("ask", "gold " * 600, "--model", tiny_folder, "--index", files / "index")
    assert "the prompt has" in long
    assert not missing.exists()


def test_bad_input_is_told_before_the_work_and_leaves_every_file_as_it_was(files: Path, tiny_folder: Path) -> None:
    place = ("--model", tiny_folder, "--index", files / "index")
    empty, few, out = files / "empty.jsonl", files / "few.jsonl", files / "out.jsonl"
    empty.write_text("")
    write_records(few, list(read_passages(files / "passages.jsonl"))[:1])
    questions, passages = files / "questions.jsonl", files / "passages.jsonl"
    before = {path: path.read_bytes() for path in files.glob("*.jsonl")}
    asked = ("generate", *place, "--input")
    assert "holds no questions to answer" in refuse_here(*asked, empty, "--output", out)
    assert "would be replaced" in refuse_here(*asked, questions, "--output", questions)
    assert "is one of passages, and questions belong here" in refuse_here(*asked, passages, "--output", out)
    assert "the question is empty" in refuse_here("ask", " ", *place)
    assert "holds no examples" in refuse_here("mine", empty, *place, "--out", out)
    converted = ("data", "convert", questions, "--passages", passages, "--out")
    assert "would be replaced" in refuse_here(*converted, passages)
    assert "holds no questions" in refuse_here("data", "convert", empty, "--passages", passages, "--out", out)
    assert "would be replaced" in refuse_here("ingest", passages, "--out", passages)
    (files / "empty.txt").write_text("")
    assert "hold no text" in refuse_here("ingest", files / "empty.txt", "--out", out)
    assert "is a file" in refuse_here("data", "build", "worldfacts", "--out", passages)
    built = ("index", "build", "--model", tiny_folder, "--passages", few, "--cited-by", questions, "--out")
    assert "cites passage 'p3', which --passages does not hold" in refuse_here(*built, files / "new")
    assert {path: path.read_bytes() for path in files.glob("*.jsonl")} == before
    assert not (files / "new").exists()


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_an_answer_that_breaks_off_is_shown_and_is_no_success(
    files: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(FaissIndex, "search", broken)
    asked = ["ask", "gold?", "--model", str(tiny_folder), "--index", str(files / "index"), "--retrieve-first", *form]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2
    assert "the search of the index failed" in done.output


def test_an_empty_corpus_leaves_no_index_and_an_endless_passage_is_split(
    files: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text("")
    write_records(tmp_path / "long.jsonl", [Passage("long", "gold " * 600)])
    build = ("index", "build", "--model", tiny_folder, "--out", out, "--passages")
    assert "the corpus is empty" in refuse(*build, tmp_path / "empty.jsonl")
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    done = run(*build, tmp_path / "long.jsonl")
    assert "1 passages were longer than the model reads, and were split" in done.stderr
    assert {p.meta["parent"] for p in FaissIndex(out)} == {"long"}


def test_an_index_is_planned_checked_searched_updated_and_emptied(
    files: Path, tiny_folder: Path, tmp_path: Path, passages: list[Passage]
) -> None:
    index, corpus = tmp_path / "planned", files / "passages.jsonl"
    model = ("--model", tiny_folder)
    planned = run("index", "build", *model, "--passages", corpus, "--out", index, "--dry-run").stdout
    assert re.search(r"12 passages, about [\d,]+ tokens; kind flat", planned)
    assert re.search(r"about [\d.]+ minutes of one worker", planned)
    assert re.search(r"disk while it is built: about [\d.]+ MB; free: ", planned)
    assert not index.exists()
    run("index", "build", *model, "--passages", corpus, "--out", index, "--dtype", "float16")
    info = run("index", "info", "--index", index).stdout
    assert "12 passages, 32 dimensions" in info
    assert "vectors as float16" in info
    assert str(corpus) in info
    checked = run("index", "check", "--index", index, *model).stdout
    assert "every checksum is right" in checked
    assert "12 passages embedded again" in checked
    found = run("index", "search", "iron", "--index", index, *model, "--where", "source=b").stdout
    assert "p9" in found
    assert "p3" not in found
    worded = run("index", "search", "iron", "--index", index, *model, "--hybrid", "9", "-k", "2").stdout
    assert "p3" in worded
    assert "p9" in worded
    write_records(corpus, [*passages[1:], Passage("new", "Silver is a metal.")])
    updated = run("index", "update", "--index", index, *model, "--passages", corpus).stdout
    assert "1 added, 0 changed, 0 with other meta alone, 1 removed, 11 unchanged; 12 passages" in updated
    assert "2 removed, 10 left" in run("index", "remove", "--index", index, "new", "p1", "gone").stdout
    assert "10 passages, kind flat" in run("index", "compact", "--index", index).stdout
    assert "the query has" in refuse("index", "search", "x " * 9000, "--index", index, *model)
    assert "must be key=value" in refuse("index", "search", "x", "--index", index, *model, "--where", "source")
    assert "--dtype is 'bf16'" in refuse(
        "index", "build", *model, "--passages", corpus, "--out", index, "--dtype", "bf16"
    )


def test_negatives_are_mined_for_every_retrieval(
    files: Path, tiny_folder: Path, tmp_path: Path, examples: list[Example]
) -> None:
    write_records(tmp_path / "examples.jsonl", examples)
    out = tmp_path / "mined.jsonl"
    said = run("mine", tmp_path / "examples.jsonl", "--model", tiny_folder, "--index", files / "index", "--out", out,
               "--count", "2", "--margin=-10").stdout  # fmt: skip
    assert "6 negatives for 3 retrievals, 0 without any" in said
    mined = list(read_examples(out))
    assert [example.id for example in mined] == [example.id for example in examples]
    right = {"p4", "p10", "p3"}
    for part in mined[1].evidence:
        assert len(part.negatives) == 2
        assert not right & set(part.negatives)


def test_an_index_of_another_model_is_refused(files: Path, tiny_lm: Path, tmp_path: Path) -> None:
    from cosup.config import ModelSection

    CoSupModel.start(ModelSection(gen=str(tiny_lm), emb_layers=1)).save(tmp_path / "other")
    for command in (("ask",), ("index", "search")):
        message = refuse(*command, "x", "--model", tmp_path / "other", "--index", files / "index")
        assert "the index was built by another model" in message
    asked = ("--model", tmp_path / "other", "--index", files / "index", "--questions", files / "questions.jsonl")
    assert "the index was built by another model" in refuse("evaluate", *asked)
    assert not (tmp_path / "other" / "evaluations").exists(), "the right index would be refused as another one"
