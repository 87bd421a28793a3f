import gzip
import json
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest

from cosup.config import UserError
from cosup.data import Evidence, Text, read_passages
from cosup.data.alce import read_alce
from cosup.data.fever import read_fever, read_fever_pages
from cosup.data.formats import format_of, read_any
from cosup.data.hotpotqa import read_hotpotqa
from cosup.data.kilt import kilt_task, read_kilt, read_kilt_pages
from cosup.data.paper import read_paper
from cosup.data.selfrag import read_selfrag
from cosup.data.squad import read_squad

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "formats").is_dir(), reason="the shared data is not here")

KILT = {
    "id": 7,
    "input": "Who governs?",
    "output": [
        {"answer": "Oslo", "provenance": [{"wikipedia_id": "12", "title": "Norway", "start_paragraph_id": 3}]},
        {"answer": "the capital", "provenance": [{"wikipedia_id": "12", "start_paragraph_id": 5}]},
        {"provenance": [{"wikipedia_id": "9"}], "meta": {}},
        {"answer": "Oslo"},
    ],
}
HOTPOT = {
    "_id": "h1",
    "question": "Which series?",
    "answer": "Animorphs",
    "supporting_facts": [["B", 0], ["A", 1], ["B", 1]],
    "context": [["A", ["One. ", "Two."]], ["B", ["Three."]], ["C", ["Four."]]],
}
FEVER = [
    {"id": 1, "label": "REFUTES", "claim": "It is.", "evidence": [[[1, 2, "A_-LRB-film-RRB-", 3]], [[1, 3, "B", 0]]]},
    {"id": 2, "label": "NOT ENOUGH INFO", "claim": "Is it?", "evidence": [[[5, None, None, None]]]},
]


def lines(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def whole(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_kilt_provenance_becomes_gold_paragraphs_and_pages(tmp_path):
    path = lines(tmp_path / "nq-dev-kilt.jsonl", KILT)
    (question,) = read_kilt(path)
    assert (question.id, question.task, question.answers) == ("7", "nq", ["Oslo", "the capital"])
    assert question.gold == ["12#3", "12#5"]
    assert question.pages == ["12", "9"]


def test_kilt_tasks_are_told_by_the_file_name_and_long_answers_kept_apart(tmp_path):
    assert kilt_task(Path("structured_zeroshot-dev-kilt.jsonl")) == "zsre"
    assert kilt_task(Path("other.jsonl")) == "kilt"
    (question,) = read_kilt(lines(tmp_path / "eli5-dev-kilt.jsonl", KILT))
    assert question.answers == []
    assert question.long_answers == ["Oslo", "the capital"]
    (question,) = read_kilt(lines(tmp_path / "nq.jsonl", {"id": "x", "input": "No output?"}), task="fever")
    assert (question.task, question.answers, question.gold) == ("fever", [], [])


def test_kilt_pages_become_the_passages_that_gold_names(tmp_path):
    page = {
        "wikipedia_id": "12",
        "wikipedia_title": "Norway",
        "text": ["Norway\n", "Section::::Name.", "A land.\n", ""],
    }
    path = tmp_path / "knowledge.json.gz"
    path.write_bytes(gzip.compress(json.dumps(page).encode() + b"\n"))
    (passage,) = read_kilt_pages(path)
    assert (passage.id, passage.text, passage.title, passage.meta) == ("12#2", "A land.", "Norway", {"page": "12"})


def test_alce_docs_become_each_questions_candidates(tmp_path):
    record = {
        "question": "Who played Ron?",
        "sample_id": "s1",
        "qa_pairs": [{"question": "In film?", "short_answers": ["Grint", "Grint"]}, {"short_answers": ["Fish"]}],
        "annotations": [{"long_answer": "Grint did."}],
        "answer": "Grint did.",
        "docs": [{"id": "1", "title": "T", "text": "Grint."}, {"title": "T", "text": "Fish."}, {"text": "Grint."}],
    }
    passages, (question,) = read_alce(whole(tmp_path / "asqa.json", [record]))
    assert (question.task, question.answers) == ("asqa", ["Grint", "Fish"])
    assert [pair.short_answers for pair in question.qa_pairs] == [["Grint"], ["Fish"]]
    assert question.long_answers == ["Grint did."]
    assert question.candidates == [passage.id for passage in passages]
    assert len(passages) == 3
    _, (question,) = read_alce(
        whole(tmp_path / "eli5.json", [{"question": "Why?", "claims": ["So."], "answer": "So!"}])
    )
    assert (question.task, question.claims, question.candidates) == ("eli5", ["So."], [])


def test_hotpotqa_gold_follows_the_annotation_and_all_paragraphs_are_candidates(tmp_path):
    passages, (question,) = read_hotpotqa(whole(tmp_path / "h.json", [HOTPOT]))
    titles = {passage.id: passage.title for passage in passages}
    assert [titles[id] for id in question.gold] == ["B", "A"]
    assert [titles[id] for id in question.candidates] == ["A", "B", "C"]
    assert passages[0].text == "One. Two."


def test_fever_evidence_becomes_gold_sentences_and_not_enough_info_has_none(tmp_path):
    refuted, unknown = read_fever(lines(tmp_path / "fever.jsonl", *FEVER))
    assert refuted.gold == ["A_-LRB-film-RRB-#3", "B#0"]
    assert refuted.pages == ["A (film)", "B"]
    assert (refuted.label, refuted.answers) == ("REFUTES", ["REFUTES"])
    assert (unknown.gold, unknown.pages, unknown.label) == ([], [], "NOT ENOUGH INFO")
    page = {"id": "A_-LRB-film-RRB-", "text": "..", "lines": "0\tIt is a film.\tfilm\n1\t\n3\tIt ended."}
    sentences = list(read_fever_pages(lines(tmp_path / "wiki-001.jsonl", page)))
    assert [(s.id, s.text) for s in sentences] == [
        ("A_-LRB-film-RRB-#0", "It is a film."),
        ("A_-LRB-film-RRB-#3", "It ended."),
    ]
    assert sentences[0].meta == {"page": "A (film)"}


def test_selfrag_passages_are_evidence_where_they_were_judged_relevant(tmp_path):
    output = (
        "Well.[Retrieval]<paragraph>Norway\nOslo governs.</paragraph>[Relevant]Oslo does.[Fully supported]"
        "[Retrieval]<paragraph>X\nNo.</paragraph>[Irrelevant]So I think.[Utility:5]"
    )
    row = {"instruction": "Who?", "input": "Norway", "output": output, "id": "a", "dataset_name": "nq"}
    (passage,), (example,) = read_selfrag(lines(tmp_path / "selfrag.jsonl", row))
    assert (passage.title, passage.text) == ("Norway", "Oslo governs.")
    assert example.response == (Text("Well."), Evidence(passage.id, "Oslo does."), Text("So I think."))
    assert example.question == "Who?\nNorway"


def test_unanswerable_squad_questions_have_their_paragraph_as_a_negative(tmp_path):
    qas = [{"id": "q", "question": "Who?", "answers": [], "is_impossible": True}]
    data = {"data": [{"title": "T", "paragraphs": [{"context": "C.", "qas": qas}]}]}
    (passage,), (question,) = read_squad(whole(tmp_path / "squad.json", data))
    assert (question.label, question.negatives, question.gold) == ("unanswerable", [passage.id], [])


PAPER = {
    "input": ["Answer.## Input:\n\nWho governs?## Output:\n\n", "None?"],
    "output": ["First [k_12]Norway :: Oslo governs.[Cs]Oslo does.[Ce] [k_3]Gold.[Cs]79[Ce]", "Nothing."],
    "evidence": [[12, 3], []],
    "input_ids": [[1, 32003], [1]],
}
TEXTS = {"[k_12]": "Norway :: Oslo governs.", "[k_3]": "Gold."}


def test_the_papers_pickle_gives_passages_and_examples(tmp_path):
    (tmp_path / "train.pickle").write_bytes(pickle.dumps(PAPER))
    passages, (first, second) = read_paper(tmp_path / "train.pickle", whole(tmp_path / "texts.json", TEXTS))
    assert [(p.id, p.title, p.text) for p in passages] == [("k_12", "Norway", "Oslo governs."), ("k_3", "", "Gold.")]
    assert first.question == "Who governs?"
    assert first.response == (Text("First"), Evidence("k_12", "Oslo does."), Evidence("k_3", "79"))
    assert second.response == (Text("Nothing."),)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("make", [Attack, lambda path: OrderedDict(a=1), lambda path: {"input": [path]}])
def test_a_pickle_with_anything_but_plain_containers_is_refused_and_not_run(tmp_path, make):
    mark = tmp_path / "ran"
    (tmp_path / "train.pickle").write_bytes(pickle.dumps(make(mark)))
    with pytest.raises(UserError, match="not a pickle of plain containers"):
        read_paper(tmp_path / "train.pickle", whole(tmp_path / "texts.json", TEXTS))
    assert not mark.exists()


def test_a_damaged_pickle_and_a_missing_passage_are_user_errors(tmp_path):
    texts = whole(tmp_path / "texts.json", {})
    (tmp_path / "train.pickle").write_bytes(pickle.dumps(PAPER)[:-9])
    with pytest.raises(UserError, match="not a pickle"):
        read_paper(tmp_path / "train.pickle", texts)
    (tmp_path / "train.pickle").write_bytes(pickle.dumps(PAPER))
    with pytest.raises(UserError, match=r"cites \[k_12\], which"):
        read_paper(tmp_path / "train.pickle", texts)
    with pytest.raises(UserError, match="--texts"):
        read_any(tmp_path / "train.pickle")
    (tmp_path / "list.pickle").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="must be a dict"):
        read_paper(tmp_path / "list.pickle", texts)


def test_each_format_is_known_by_its_beginning(tmp_path):
    found = {
        "kilt": lines(tmp_path / "a.jsonl", KILT),
        "fever": lines(tmp_path / "b.jsonl", *FEVER),
        "selfrag": lines(tmp_path / "c.jsonl", {"instruction": "i", "output": "o", "dataset_name": "d"}),
        "hotpotqa": whole(tmp_path / "d.json", [HOTPOT]),
        "alce": whole(tmp_path / "e.json", [{"question": "Why?"}]),
        "squad": whole(tmp_path / "f.json", {"version": "v2.0", "data": []}),
        "cosup": lines(tmp_path / "g.jsonl", {"id": "q", "task": "nq", "question": "?"}),
        "paper": tmp_path / "h.pickle",
    }
    assert {name: format_of(path) for name, path in found.items()} == {name: name for name in found}


@pytest.mark.parametrize(
    ("read", "name", "content", "said"),
    [
        (read_kilt, "x.jsonl", '{"id": 1}\n', r"x.jsonl:1 is not KILT.*input is missing"),
        (read_kilt, "x.jsonl", "{\n", "not KILT.*Invalid JSON"),
        (read_kilt, "x.jsonl", '{"id": 1, "input": "a"}\n{"id": 1, "input": "b"}\n', "occurs twice"),
        (read_alce, "x.json", "[]", "holds no question"),
        (read_alce, "x.json", '[{"question": 3}]', r"\[0\].question is 3"),
        (read_hotpotqa, "x.json", '[{"_id": "a", "question": "?", "context": []}]', "context is"),
        (read_fever, "x.jsonl", '{"id": 1, "claim": ""}\n', "claim is ''"),
    ],
)
def test_what_is_malformed_is_named_with_its_place(tmp_path, read, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read(tmp_path / name)


@pytest.mark.parametrize("read", [read_kilt, read_alce, read_hotpotqa, read_fever, read_selfrag])
def test_a_file_that_is_not_there_is_a_user_error(tmp_path, read):
    with pytest.raises(UserError, match="there is no file"):
        read(tmp_path / "none.jsonl")


@needs_shared
def test_the_original_hotpotqa_sample_cites_passages_of_the_shared_corpus():
    passages, questions = read_hotpotqa(SHARED / "formats" / "hotpotqa_distractor.json")
    assert len(questions) == 15
    corpus = {passage.id: passage.text for passage in read_passages(SHARED / "corpus.jsonl.gz")}
    ours = {passage.id: passage.text for passage in passages}
    shared = [id for question in questions for id in question.gold if corpus.get(id) == ours[id]]
    assert len(shared) > 10
    assert all(set(question.gold) <= set(question.candidates) for question in questions)


@needs_shared
@pytest.mark.parametrize(("name", "count"), [("fever.jsonl", 80), ("kilt.jsonl", 3), ("alce_eli5_eval.json", 40)])
def test_the_original_samples_are_read_whole(name, count):
    assert len(read_any(SHARED / "formats" / name).questions) == count
