import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cosup.config import UserError
from cosup.data.records import read_passages, read_questions
from cosup.data.squad import is_squad, read_squad

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")


def _qa(id="q1", question="Where?", answers=("Paris",)):
    return {"id": id, "question": question, "answers": [{"text": text, "answer_start": 0} for text in answers]}


def _file(path, *qas, title="Eiffel_Tower", context="It stands in Paris."):
    article = {"title": title, "paragraphs": [{"context": context, "qas": list(qas)}]}
    path.write_text(json.dumps({"version": "1.1", "data": [article]}))
    return path


def test_a_paragraph_is_a_passage_and_its_questions_cite_it(tmp_path):
    passages, questions = read_squad(_file(tmp_path / "s.json", _qa("q1"), _qa("q2", "In which city?")))
    [passage] = passages
    assert (passage.title, passage.text) == ("Eiffel Tower", "It stands in Paris.")
    assert passage.id == "p-" + hashlib.sha1(b"Eiffel Tower\nIt stands in Paris.").hexdigest()[:12]
    assert [question.id for question in questions] == ["q1", "q2"]
    assert all(question.task == "squad" and question.gold == [passage.id] for question in questions)


def test_answers_are_distinct_and_keep_their_order(tmp_path):
    qa = _qa(answers=["in Paris", "Paris", "in Paris", "Paris "])
    [question] = read_squad(_file(tmp_path / "s.json", qa))[1]
    assert question.answers == ["in Paris", "Paris"]


def test_stray_spaces_in_a_question_are_taken_out(tmp_path):
    [question] = read_squad(_file(tmp_path / "s.json", _qa(question=" In  which city?\n")))[1]
    assert question.question == "In which city?"


def test_percent_encoded_titles_are_decoded(tmp_path):
    [passage] = read_squad(_file(tmp_path / "s.json", title="Beyonc%C3%A9_Knowles"))[0]
    assert passage.title == "Beyoncé Knowles"


def test_a_paragraph_that_occurs_twice_is_one_passage(tmp_path):
    path = _file(tmp_path / "s.json", _qa("q1"))
    content = json.loads(path.read_text())
    paragraphs = content["data"][0]["paragraphs"]
    paragraphs.append({**paragraphs[0], "qas": [_qa("q2")]})
    path.write_text(json.dumps(content))
    passages, questions = read_squad(path)
    assert len(passages) == 1
    assert [question.gold for question in questions] == [[passages[0].id]] * 2


@pytest.mark.parametrize(
    ("qa", "reason"),
    [
        ({"id": "q", "question": "Where?"}, r"data\[0\].paragraphs\[0\].qas\[1\].answers is missing"),
        ({**_qa(), "answers": "Paris"}, r"qas\[1\].answers is 'Paris', but the input should be a valid array"),
        ({**_qa(), "answers": []}, r"qas\[1\]: answers is empty, and is_impossible does not say"),
        ({**_qa(), "answers": [{"text": 5}]}, r"qas\[1\].answers\[0\].text is 5, but .* valid string"),
        ({**_qa(), "question": "  "}, r"qas\[1\].question is '  ', but .* at least 1 character"),
        ({**_qa(), "id": None}, r"qas\[1\].id is None, but .* valid string"),
    ],
)
def test_what_is_malformed_is_named_with_its_place(tmp_path, qa, reason):
    path = _file(tmp_path / "s.json", _qa("q0"), qa)
    with pytest.raises(UserError, match=reason) as error:
        read_squad(path)
    assert str(path) in str(error.value)


def test_a_question_id_that_repeats_is_an_error(tmp_path):
    with pytest.raises(UserError, match="the question id 'q1' occurs twice"):
        read_squad(_file(tmp_path / "s.json", _qa("q1"), _qa("q1")))


def test_a_damaged_missing_or_unreadable_file_is_a_user_error(tmp_path):
    cut = tmp_path / "cut.json"
    cut.write_text('{"data": [{"title": ')
    with pytest.raises(UserError, match=r"not SQuAD JSON: Invalid JSON.*download it again"):
        read_squad(cut)
    with pytest.raises(UserError, match="there is no file"):
        read_squad(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"can't be read \(Is a directory\)"):
        read_squad(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '{"data": []}', True),
        ("a.json", ' {\n "version" : "1.1", "size": 3,\n "data" :\n [', True),
        ("a.json", '{"data": {"rows": []}}', False),
        ("a.json", '{"rows": {"data": []}}', False),
        ("a.json", '[{"data": []}]', False),
        ("a.json", "", False),
        ("a.jsonl", '{"data": []}', False),
    ],
)
def test_squad_is_known_by_its_suffix_and_first_bytes(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content)
    assert is_squad(path) is expected


def test_a_path_without_a_file_is_not_squad(tmp_path):
    (tmp_path / "folder.json").mkdir()
    assert not is_squad(tmp_path / "folder.json")
    assert not is_squad(tmp_path / "none.json")


def test_only_the_head_of_a_file_is_read_to_know_it(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.write(b'{"data": [')
        file.truncate(1 << 36)  # sparse: reading it whole would exhaust the memory
    assert is_squad(path)


@needs_shared
def test_the_sample_gives_the_passages_and_questions_of_the_shared_data():
    passages, questions = read_squad(SHARED / "formats" / "squad_v1.1.json")
    corpus = {passage.id: passage for passage in read_passages(SHARED / "corpus.jsonl.gz")}
    train = {question.id: question for question in read_questions(SHARED / "train" / "squad.jsonl.gz")}
    assert (len(passages), len(questions)) == (20, 145)
    assert all(corpus[passage.id] == passage for passage in passages)
    shared = [question for question in questions if f"squad-{question.id}" in train]
    assert len(shared) > 100
    for question in shared:
        assert replace(question, id=f"squad-{question.id}") == train[f"squad-{question.id}"]
