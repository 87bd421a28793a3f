import gzip
import json

import pytest

from cosup.data.check import check

PASSAGE = {"id": "p-1", "text": "Paris is in France.", "title": "Paris"}
QUESTION = {"id": "q-1", "task": "squad", "question": "Where is Paris?", "answers": ["France"], "gold": ["p-1"]}
EVIDENCE = {"passage": "p-1", "claim": "It is in France."}
EXAMPLE = {"id": "e-1", "task": "squad", "question": "Where?", "response": [{"text": "Well: "}, EVIDENCE]}


@pytest.fixture
def write(tmp_path):
    def write_lines(name, *lines):
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write_lines


def _found(*paths):
    return [(problem.path.name, problem.line, problem.reason) for problem in check(paths)]


def test_sound_files_have_no_problem(write):
    files = write("p.jsonl", PASSAGE), write("q.jsonl", QUESTION), write("e.jsonl", EXAMPLE)
    assert check(files) == []


def test_nothing_to_check_is_no_problem():
    assert check([]) == []


def test_every_line_that_is_no_record_is_reported_with_its_number(write):
    path = write("p.jsonl", PASSAGE, "", "{", {"id": "p-2"}, {**PASSAGE, "id": "p-3", "txt": ""})
    assert [(line, reason.split(":")[0]) for _, line, reason in _found(path)] == [
        (3, "not JSON"),
        (4, "the key 'text' is missing"),
        (5, "unknown key 'txt'"),
    ]


def test_an_id_that_repeats_is_reported_with_the_place_that_has_it(write):
    first = write("a.jsonl", PASSAGE, "", PASSAGE)
    second = write("b.jsonl", {**PASSAGE, "text": "Other."})
    reason = f"the id 'p-1' is already that of {first}:1; ids must be unique"
    assert _found(first, second) == [("a.jsonl", 3, reason), ("b.jsonl", 1, reason)]


def test_records_of_different_kinds_may_share_an_id(write):
    files = write("p.jsonl", PASSAGE), write("q.jsonl", {**QUESTION, "id": "p-1"})
    assert check(files) == []


def test_a_file_that_is_named_twice_is_checked_once(write):
    path = write("p.jsonl", PASSAGE)
    assert check([path, path]) == []


def test_blank_texts_questions_and_claims_are_reported(write):
    files = (
        write("p.jsonl", {**PASSAGE, "text": " \n"}),
        write("q.jsonl", {**QUESTION, "question": "\t"}),
        write("e.jsonl", {**EXAMPLE, "question": " ", "response": [{"text": " "}, {**EVIDENCE, "claim": ""}]}),
    )
    assert [(name, reason.split(";")[0]) for name, _, reason in _found(*files)] == [
        ("p.jsonl", "text: it is blank"),
        ("q.jsonl", "question: it is blank"),
        ("e.jsonl", "question: it is blank"),
        ("e.jsonl", "response.1.claim: it is blank"),
    ]


def test_an_example_without_any_part_is_reported(write):
    [(_, line, reason)] = _found(write("e.jsonl", EXAMPLE, {**EXAMPLE, "id": "e-2", "response": []}))
    assert line == 2
    assert reason.startswith("response: it has no part")


def test_citations_of_absent_passages_are_reported_whatever_the_order_of_files(write):
    question = write("q.jsonl", {**QUESTION, "gold": ["p-1", "p-7"], "negatives": ["p-8", "p-2"]})
    evidence = {**EVIDENCE, "passage": "p-4", "also": ["p-5", "p-1"], "negatives": ["p-6", "p-4"]}
    example = write("e.jsonl", {**EXAMPLE, "response": [evidence]})
    passages = write("a.jsonl", PASSAGE), write("b.jsonl", {**PASSAGE, "id": "p-2"})
    assert _found(question, passages[0], example, passages[1]) == [
        (name, 1, f"cites passage {id!r}, which is in none of the passages files")
        for name, ids in [("q.jsonl", ["p-7", "p-8"]), ("e.jsonl", ["p-4", "p-5", "p-6"])]
        for id in ids
    ]


def test_citations_are_not_checked_without_a_passages_file(write):
    assert check([write("q.jsonl", QUESTION), write("e.jsonl", EXAMPLE)]) == []


def test_a_file_that_cannot_be_read_does_not_hide_the_problems_of_others(write, tmp_path):
    empty, strange = write("empty.jsonl"), write("strange.jsonl", {"name": "x"})
    bad = write("bad.jsonl", {**PASSAGE, "text": " "})
    assert [(name, line) for name, line, _ in _found(tmp_path / "none.jsonl", empty, tmp_path, strange, bad)] == [
        ("none.jsonl", 1),
        ("empty.jsonl", 1),
        (tmp_path.name, 1),
        ("strange.jsonl", 1),
        ("bad.jsonl", 1),
    ]
    assert str(check([strange])[0]).startswith(f"{strange}:1: neither a passage")


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:400] + b"\xff" * 40 + data[440:]])
def test_a_damaged_gzip_file_is_a_problem_and_not_a_crash(tmp_path, damage):
    path = tmp_path / "p.jsonl.gz"
    lines = [json.dumps({**PASSAGE, "id": f"p-{number}", "text": f"{number * 7919} "}) for number in range(3000)]
    path.write_bytes(damage(gzip.compress("\n".join(lines).encode())))
    *_, last = check([path])
    assert last.path == path
    assert str(path) in str(last)
