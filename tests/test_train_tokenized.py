"""Tokenised training data: the same batches as tokenising live, kept between runs, never half there."""

import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import corpus, recipe

from cosup.config import TrainSection, UserError, parse_recipe
from cosup.data import Evidence, Example, Passage, Question, read_examples, read_questions, write_records
from cosup.data.convert import convert
from cosup.files import cache_folder
from cosup.model import CoSupModel
from cosup.template import Template
from cosup.train import Collator, collate, load_data
from cosup.train import tokenized as module
from cosup.train.rows import passage_key

__all__ = ["corpus", "recipe"]  # fixtures


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folders() -> list[Path]:
    return sorted(path for path in (cache_folder() / "tokenized").iterdir() if path.is_dir())


def test_batches_are_those_of_examples_that_are_tokenised_live(
    recipe: dict, tiny: CoSupModel, passages: list[Passage], corpus: Path
) -> None:
    made = parse_recipe({**recipe, "train": {"negatives": 2}})
    data = load_data(made, tiny.template)
    by_id = {p.id: p for p in passages}
    live = []
    for path in map(made.data.resolve, made.data.train):
        if "question" in path.name:
            live += convert(read_questions(path), passages=by_id)
        else:
            live += read_examples(path)
    assert [row.id for row in (data.examples[i] for i in range(len(data.examples)))] == [e.id for e in live]
    for section in (made.train, TrainSection(objective="ntp"), TrainSection(objective="nsp")):
        cached = Collator(data.sequences, section)([data.examples[i] for i in range(len(live))])
        expected = collate(tiny.template, live, by_id, section)
        assert cached.keys() == expected.keys()
        for key, value in expected.items():
            same = torch.equal(cached[key], value) if isinstance(value, torch.Tensor) else cached[key] == value
            assert same, key
    titles = [by_id[e.evidence[0].passage].title if e.evidence else "" for e in live]
    assert data.examples.groups() == [passage_key(t or e.id) for t, e in zip(titles, live, strict=True)]


def test_what_was_tokenised_before_is_opened_and_anything_that_changes_it_tokenises_again(
    recipe: dict, tiny: CoSupModel, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *arguments: built.append(1) or build(*arguments))
    for _ in range(2):
        load_data(parse_recipe(recipe), tiny.template)
    assert len(built) == 1
    load_data(parse_recipe({**recipe, "train": {"train_on_passages": True}}), tiny.template)
    load_data(parse_recipe({**recipe, "data": recipe["data"] | {"max_tokens": 200}}), tiny.template)
    load_data(parse_recipe({**recipe, "train": {"learning_rate": 0.5, "negatives": 3}}), tiny.template)  # no matter
    assert len(built) == 3
    with (corpus / "questions.jsonl").open("a") as file:
        file.write('{"id": "new", "task": "squad", "question": "New?", "answers": ["a"], "gold": ["p0"]}\n')
    data = load_data(parse_recipe(recipe), tiny.template)
    assert len(built) == 4
    assert "new" in [data.examples[i].id for i in range(len(data.examples))]


def test_another_end_of_sequence_token_tokenises_again(recipe: dict, tiny: CoSupModel) -> None:
    made = parse_recipe(recipe)
    ends = [load_data(made, template).examples[0].ids[-1] for template in (tiny.template, _ending_with(tiny, 7))]
    assert ends == [tiny.template.eos, 7]


def _ending_with(model: CoSupModel, eos: int) -> Template:
    template = Template(model.template.tokenizer, settings=model.template.settings)
    template.eos = eos
    return template


def test_a_negative_that_no_file_of_passages_holds_is_named(recipe: dict, tiny: CoSupModel, corpus: Path) -> None:
    example = Example("e", "squad", "Which?", (Evidence("p0", "Oslo", negatives=("elsewhere", "nowhere")),))
    write_records(corpus / "examples.jsonl", [example])
    with pytest.raises(UserError, match="the examples name 'elsewhere' and 1 others as gold or negative"):
        load_data(parse_recipe(recipe), tiny.template)


def test_a_file_that_can_not_be_read_is_named(
    recipe: dict, tiny: CoSupModel, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == "questions.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"questions.jsonl can't be read \(Permission denied\)"):
        load_data(parse_recipe(recipe), tiny.template)


def test_a_failure_leaves_nothing_and_a_damaged_cache_is_made_again(
    recipe: dict, tiny: CoSupModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_sequences", lambda *_: (_ for _ in ()).throw(UserError("the disk is full")))
        with pytest.raises(UserError, match="the disk is full"):
            load_data(parse_recipe(recipe), tiny.template)
    assert folders() == []
    data = load_data(parse_recipe(recipe), tiny.template)
    rows = [data.examples[i] for i in range(len(data.examples))]
    (folder,) = folders()
    path = folder / "examples.arrow"
    whole = path.read_bytes()
    path.unlink()  # what is mapped stays as it is
    path.write_bytes(whole[:-100])
    with caplog.at_level(logging.WARNING):
        again = load_data(parse_recipe(recipe), tiny.template)
    assert "is damaged" in caplog.text
    assert [again.examples[i] for i in range(len(again.examples))] == rows


def test_a_cache_folder_that_can_not_be_made_is_told_in_a_sentence(
    recipe: dict, tiny: CoSupModel, own_cache: Path
) -> None:
    own_cache.write_text("a file")
    with pytest.raises(UserError, match="can't be written"):
        load_data(parse_recipe(recipe), tiny.template)


def test_what_was_left_out_and_shortened_is_told_the_second_time_too(recipe: dict, tiny: CoSupModel) -> None:
    template = tiny.template
    template.settings = template.settings.model_copy(update={"max_passage_tokens": 12})
    made = parse_recipe({**recipe, "data": recipe["data"] | {"max_tokens": 60, "max_passage_tokens": 12}})
    first, second = (load_data(made, template) for _ in range(2))
    assert first.shortened == second.shortened > 0
    assert first.left_out == second.left_out
    assert first.left_out["longer than 60 tokens"] > 0


def test_a_passage_that_is_cited_nowhere_is_not_kept(recipe: dict, tiny: CoSupModel) -> None:
    data = load_data(parse_recipe(recipe), tiny.template)
    assert 0 < len(data.sequences) < data.passages
    assert list(data.sequences) == sorted(data.sequences)
    with pytest.raises(KeyError):
        data.sequences[passage_key("nowhere")]


def _load(recipe: dict, folder: Path, results: "multiprocessing.Queue[tuple[int, list[str]]]") -> None:
    model = CoSupModel.load(folder, dtype="float64", device="cpu")
    built = []
    build = module._build
    module._build = lambda *arguments: built.append(1) or build(*arguments)  # type: ignore[func-returns-value]
    data = load_data(parse_recipe(recipe), model.template)
    results.put((len(built), [data.examples[i].id for i in range(len(data.examples))]))


@pytest.mark.slow
def test_of_two_processes_that_start_at_once_one_tokenises(recipe: dict, tiny_folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_load, args=(recipe, tiny_folder, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert sorted(count for count, _ in found) == [0, 1]
    assert found[0][1] == found[1][1] != []


@pytest.mark.slow
def test_several_processes_tokenise_to_the_same_bytes(
    recipe: dict, tiny: CoSupModel, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [
        Question(f"q{i}", "squad", f"What is {i}?", answers=["Oslo"], gold=[f"p{i % 12}"]) for i in range(2000)
    ]
    write_records(corpus / "questions.jsonl", questions)
    load_data(parse_recipe(recipe), tiny.template)
    (folder,) = folders()
    alone = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(corpus / "other"))
    monkeypatch.setattr(module, "_WORTH", 0)
    load_data(parse_recipe(recipe), tiny.template)
    (folder,) = folders()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == alone
