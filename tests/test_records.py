import gzip
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosup.config import UserError
from cosup.data.records import (
    Evidence,
    Example,
    Passage,
    Problem,
    QAPair,
    Question,
    Text,
    kind_of,
    read_examples,
    read_passages,
    read_questions,
    read_records,
    to_json,
    write_records,
)

PASSAGE = {"id": "p-1", "text": "Paris is in France."}
QUESTION = {"id": "q-1", "task": "squad", "question": "Where is Paris?", "answers": ["France"], "gold": ["p-1"]}
EVIDENCE = {"passage": "p-1", "claim": "It is in France."}
EXAMPLE = {"id": "e-1", "task": "squad", "question": "Where?", "response": [{"text": "Well: "}, EVIDENCE]}
READERS = {"passages": read_passages, "questions": read_questions, "examples": read_examples}

ID = st.text(min_size=1, max_size=5)
WORDS = st.text(max_size=12)
FILLED = st.text(min_size=1, max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
PASSAGES = st.builds(Passage, ID, FILLED, WORDS, st.dictionaries(WORDS, JSON, max_size=3))
QA_PAIRS = st.builds(QAPair, WORDS, st.lists(WORDS, max_size=2))
QUESTIONS = st.builds(
    Question,
    ID,
    ID,
    FILLED,
    answers=st.lists(WORDS, max_size=2),
    gold=st.lists(ID, max_size=2),
    long_answers=st.lists(WORDS, max_size=2),
    claims=st.lists(WORDS, max_size=2),
    qa_pairs=st.lists(QA_PAIRS, max_size=2),
    negatives=st.lists(ID, max_size=2),
    silver=st.booleans(),
    label=WORDS,
)
IDS = st.lists(ID, max_size=2).map(tuple)
PARTS = st.builds(Text, WORDS) | st.builds(Evidence, ID, WORDS, IDS, IDS)
EXAMPLES = st.builds(Example, ID, ID, FILLED, st.lists(PARTS, max_size=3).map(tuple))


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines, name="file.jsonl"):
        path = tmp_path / name
        texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"".join(text + b"\n" for text in texts))
        return path

    return write_lines


def _refused(iterator):
    with pytest.raises(UserError) as caught:
        list(iterator)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# There and back


@pytest.mark.parametrize("name", ["file.jsonl", "file.jsonl.gz"])
@given(data=st.data())
def test_what_is_written_reads_back_equal(name, data):
    kind = data.draw(st.sampled_from(sorted(READERS)))
    strategy = {"passages": PASSAGES, "questions": QUESTIONS, "examples": EXAMPLES}[kind]
    records = data.draw(st.lists(strategy, max_size=4, unique_by=lambda record: record.id))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        assert write_records(path, records) == len(records)
        assert list(READERS[kind](path)) == records
        if records:
            assert kind_of(path) == kind
        assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


def test_a_gzipped_file_is_known_by_its_content_and_not_by_its_name(write):
    path = write(PASSAGE)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert [passage.id for passage in read_passages(path)] == ["p-1"]


def test_writing_gzip_at_another_time_gives_the_same_bytes(tmp_path, monkeypatch):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_records(tmp_path / name, [Passage("p", "text")])
        monkeypatch.setattr("time.time", lambda: 1e9)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


@pytest.mark.parametrize("name", ["file.jsonl", "file.jsonl.gz"])
def test_records_that_fail_halfway_leave_no_file(tmp_path, name):
    def records():
        yield Passage("p", "text")
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_records(tmp_path / name, records())
    assert list(tmp_path.iterdir()) == []


def test_several_files_are_read_in_order(write):
    first, second = write(PASSAGE, name="a.jsonl"), write({**PASSAGE, "id": "p-2"}, name="b.jsonl")
    assert [passage.id for passage in read_passages(second, first)] == ["p-2", "p-1"]


def _json(record):
    return json.loads(json.dumps(to_json(record)))


def test_json_leaves_out_what_is_empty_and_keeps_what_every_record_has():
    assert _json(Passage("p", "text")) == {"id": "p", "text": "text"}
    question = {"id": "q", "task": "t", "question": "Q?"}
    assert _json(Question("q", "t", "Q?")) == {**question, "answers": [], "gold": []}
    parts = [{"text": ""}, {"passage": "p", "claim": ""}]
    assert _json(Example("q", "t", "Q?", (Text(""), Evidence("p", "")))) == {**question, "response": parts}


def test_json_keeps_what_is_not_empty():
    evidence = Evidence("p", "claim", also=("a",), negatives=("n",))
    assert _json(Example("e", "t", "Q?", (evidence,)))["response"] == [
        {"passage": "p", "claim": "claim", "also": ["a"], "negatives": ["n"]}
    ]
    assert _json(Passage("p", "text", "title", {"url": "u"})) == {
        "id": "p",
        "text": "text",
        "title": "title",
        "meta": {"url": "u"},
    }


def test_the_evidence_of_an_example_is_its_citations_in_order():
    first, second = Evidence("a", "1"), Evidence("b", "2")
    assert tuple(Example("e", "t", "Q?", (Text("x"), first, Text("y"), second)).evidence) == (first, second)


# Lines that are no record


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        ("passages", b"{", "not JSON: EOF while parsing an object at column 1"),
        ("passages", b'{"id": "p", "text": "a"} x', "not JSON: trailing characters at column 26"),
        ("passages", b'{"id": "p", "text": "caf\xe9"}', "not UTF-8 (byte 25 of the line)"),
        ("passages", {"id": "p"}, "the key 'text' is missing"),
        ("passages", {**PASSAGE, "txt": ""}, "unknown key 'txt'"),
        ("passages", {**PASSAGE, "id": 7}, "id: input should be a valid string"),
        ("passages", {**PASSAGE, "id": ""}, "id: string should have at least 1 character"),
        ("passages", {**PASSAGE, "text": ""}, "text: string should have at least 1 character"),
        ("passages", [1], "input should be an object"),
        ("passages", QUESTION, "the line is one of questions, and passages belong here"),
        ("questions", EXAMPLE, "the line is one of examples, and questions belong here"),
        ("examples", PASSAGE, "the line is one of passages, and examples belong here"),
        ("questions", {**QUESTION, "answers": "France"}, "answers: input should be a valid array"),
        ("questions", {**QUESTION, "qa_pairs": [{"q": 1}]}, "the key 'qa_pairs.0.question' is missing"),
        ("questions", {**QUESTION, "silver": "yes"}, "silver: input should be a valid boolean"),
        ("examples", {**EXAMPLE, "response": [{"passage": "p"}]}, "the key 'response.0.claim' is missing"),
        ("examples", {**EXAMPLE, "response": [{"text": "a", "claim": ""}]}, "unknown key 'response.0.claim'"),
    ],
)
def test_a_line_that_is_no_record_is_told_with_its_number_and_does_not_end_the_reading(write, kind, line, reason):
    good = {"passages": PASSAGE, "questions": QUESTION, "examples": EXAMPLE}[kind]
    path = write(good, b"", line, good)
    first, problem, last = read_records(path, kind)
    assert isinstance(problem, Problem)
    assert (problem.path, problem.line) == (path, 3)
    assert problem.reason == reason
    assert first == last
    assert _refused(READERS[kind](path)) == f"{path}:3: {problem.reason}"


def test_blank_lines_mean_nothing(write):
    assert len(list(read_passages(write(b"", PASSAGE, b" \t", b"\r")))) == 1


def test_line_separators_of_unicode_end_no_line(tmp_path):
    text = "a\u2028b\u2029c\x85d\re\x0bf"
    write_records(tmp_path / "file.jsonl", [Passage("p", text)])
    assert [passage.text for passage in read_passages(tmp_path / "file.jsonl")] == [text]


def test_an_id_that_occurs_twice_is_refused_within_and_between_files(write):
    twice = write(PASSAGE, PASSAGE)
    assert _refused(read_passages(twice)) == f"{twice}: the id 'p-1' occurs twice; ids must be unique"
    first, second = write(PASSAGE, name="a.jsonl"), write(PASSAGE, name="b.jsonl")
    assert _refused(read_passages(first, second)).startswith(f"{second}: the id 'p-1' occurs twice")


# Files that can't be read


def test_a_missing_file_is_named(tmp_path):
    assert f"there is no file {tmp_path / 'none.jsonl'}" in _refused(read_passages(tmp_path / "none.jsonl"))


def test_a_folder_is_named(tmp_path):
    assert f"{tmp_path} is a folder" in _refused(read_passages(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: data[:3],
        lambda data: data[:400] + b"\xff" * 40 + data[440:],
        lambda data: data[:-8] + b"\0" * 8,
    ],
    ids=["truncated", "only a start", "overwritten", "wrong checksum"],
)
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    path = tmp_path / "file.jsonl.gz"
    lines = [json.dumps({"id": f"p-{number}", "text": f"{number * 7919}"}) for number in range(2000)]
    path.write_bytes(damage(gzip.compress("\n".join(lines).encode())))
    assert _refused(read_passages(path)).startswith(f"{path} is a damaged gzip file (")


def test_a_file_that_may_not_be_read_is_named(write, monkeypatch):
    path = write(PASSAGE)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything

        def refuse(self, mode):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "open", refuse)
    assert f"{path} can't be read (Permission denied)" in _refused(read_passages(path))


def test_a_name_that_the_system_refuses_is_an_error_of_the_user(tmp_path):
    assert "can't be read (File name too long)" in _refused(read_passages(tmp_path / ("a" * 300)))


# What a file holds


@pytest.mark.parametrize(("line", "kind"), [(PASSAGE, "passages"), (QUESTION, "questions"), (EXAMPLE, "examples")])
def test_what_a_file_holds_is_told_by_its_first_recognisable_line(write, line, kind):
    assert kind_of(write(line)) == kind
    assert kind_of(write(b"", b"{", b"[1]", b"7", {"name": "x"}, line, PASSAGE, QUESTION)) == kind


def test_a_file_without_a_recognisable_line_is_refused_at_its_first_line(write):
    path = write(b"", {"name": "x"}, b"{", b'["text"]', b'"question"')
    with pytest.raises(UserError) as caught:
        kind_of(path)
    assert str(caught.value).startswith(f"{path}:2: neither a passage (`text`), a question (`question`) nor an example")


def test_an_empty_file_is_refused_by_its_name(write):
    path = write(b"", b" ")
    with pytest.raises(UserError) as caught:
        kind_of(path)
    assert str(caught.value).startswith(f"{path}:1: there is no record: the file is empty")
