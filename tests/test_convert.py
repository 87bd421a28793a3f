from collections import Counter

import pytest

from cosup.config import UserError
from cosup.data.convert import DEFAULT_RULE, TASKS, convert, rule_of
from cosup.data.records import Evidence, Example, Passage, QAPair, Question

TITLES = {"p1": "One", "p2": "Two", "p3": "Three", "n1": "None"}
PASSAGES = {id: Passage(id, "It says nothing of the kind.", title) for id, title in TITLES.items()}
ALTERNATIVES = sorted(task for task, rule in TASKS.items() if rule.golds == "alternatives" and rule.claim == "answer")
HOPS = sorted(task for task, rule in TASKS.items() if rule.golds == "hops" and rule.claim == "answer")
LONG = sorted(task for task, rule in TASKS.items() if rule.golds == "alternatives" and rule.claim == "long_answer")
LONG_HOPS = ["worldfacts-hop"]


def _question(task="squad", **fields):
    return Question("q", task, "Which?", **{"answers": ["first", "second"], "gold": ["p1"], **fields})


def _response(question, passages=PASSAGES):
    [example] = convert([question], passages=passages)
    assert (example.id, example.task, example.question) == (question.id, question.task, question.question)
    return example.response


def test_every_task_is_of_one_of_the_kinds_tested_here():
    assert sorted([*ALTERNATIVES, *HOPS, *LONG, *LONG_HOPS]) == sorted(TASKS)
    assert {"fever", "fm2"} <= set(ALTERNATIVES)
    assert {"hotpotqa", "musique"} <= set(HOPS)
    assert set(LONG) == {"asqa", "eli5", "worldfacts-slot", "worldfacts-qa", "worldfacts-claim"}


# One retrieval


@pytest.mark.parametrize("task", ALTERNATIVES)
def test_the_first_answer_is_the_claim_and_the_first_gold_the_label(task):
    assert _response(_question(task)) == (Evidence("p1", "first"),)


@pytest.mark.parametrize("task", [*ALTERNATIVES, *LONG])
def test_further_golds_of_alternatives_are_right_too(task):
    [evidence] = _response(_question(task, gold=["p2", "p1", "p3"], long_answers=["first"]))
    assert (evidence.passage, evidence.also) == ("p2", ("p1", "p3"))


@pytest.mark.parametrize("task", LONG)
def test_long_answers_are_the_claims_of_tasks_that_ask_for_detail(task):
    assert _response(_question(task, long_answers=["a long one", "other"])) == (Evidence("p1", "a long one"),)


@pytest.mark.parametrize("task", ["fever", "fm2"])
def test_the_verdict_is_the_claim_of_a_statement(task):
    assert _response(_question(task, answers=["REFUTES"], label="REFUTES")) == (Evidence("p1", "REFUTES"),)


def test_negatives_go_with_every_retrieval():
    assert _response(_question(negatives=["n1"]))[0].negatives == ("n1",)
    hops = _response(_question("musique", gold=["p1", "p2"], negatives=["n1", "p3"]))
    assert [evidence.negatives for evidence in hops] == [("n1", "p3")] * 2


# Hops


@pytest.mark.parametrize("task", HOPS)
def test_a_hop_without_its_own_answer_claims_the_title_that_it_leads_to(task):
    hops = _response(_question(task, gold=["p3", "p1", "p2"]))
    assert hops == (Evidence("p3", "One"), Evidence("p1", "Two"), Evidence("p2", "first"))


@pytest.mark.parametrize("task", LONG_HOPS)
def test_the_last_hop_of_a_task_that_states_its_answer_claims_the_long_answer(task):
    hops = _response(_question(task, gold=["p3", "p1"], long_answers=["a sentence"]))
    assert hops == (Evidence("p3", "One"), Evidence("p1", "a sentence"))


def test_hops_with_an_answer_each_claim_it_and_end_with_the_answer_of_the_question():
    pairs = [QAPair("1?", ["one", "uno"]), QAPair("2?", ["two"]), QAPair("3?", ["three"])]
    hops = _response(_question("musique", gold=["p3", "p1", "p2"], qa_pairs=pairs))
    assert hops == (Evidence("p3", "one"), Evidence("p1", "two"), Evidence("p2", "first"))


@pytest.mark.parametrize(
    "pairs",
    [[QAPair("1?", ["one"])], [QAPair("1?", ["one"]), QAPair("2?", [])]],
    ids=["fewer than hops", "one without an answer"],
)
def test_hops_whose_answers_are_incomplete_claim_titles(pairs):
    hops = _response(_question("musique", gold=["p1", "p2"], qa_pairs=pairs))
    assert [evidence.claim for evidence in hops] == ["Two", "first"]


def test_a_hop_without_answer_and_title_claims_the_question():
    hops = _response(_question("hotpotqa", gold=["p1", "p2"]), PASSAGES | {"p2": Passage("p2", "Nothing.")})
    assert [evidence.claim for evidence in hops] == ["Which?", "first"]


def test_a_single_hop_is_one_retrieval():
    assert _response(_question("hotpotqa")) == (Evidence("p1", "first"),)


def test_hops_are_no_alternatives_of_each_other():
    assert [evidence.also for evidence in _response(_question("hotpotqa", gold=["p1", "p2"]))] == [(), ()]


# What gives no example


def test_questions_that_give_no_example_are_counted_by_reason():
    questions = [
        _question(),
        _question(gold=[]),
        _question(answers=[]),
        _question(gold=[], answers=[]),
        _question("asqa"),
        _question("hotpotqa", gold=["p1", "p2"], answers=[]),
    ]
    left_out = Counter({"no answer": 1})
    assert len(list(convert(questions, passages=PASSAGES, left_out=left_out))) == 1
    assert left_out == {"no answer": 4, "no gold passage": 2}


def test_questions_that_give_no_example_are_left_out_without_a_counter_too():
    assert list(convert([_question(gold=[]), _question()], passages=PASSAGES)) == [
        Example("q", "squad", "Which?", (Evidence("p1", "first"),))
    ]


@pytest.mark.parametrize(
    "fields", [{"gold": ["p1", "gone"]}, {"negatives": ["gone"]}, {"gold": ["gone"], "answers": []}]
)
def test_a_citation_of_an_unknown_passage_is_refused_with_both_ids(fields):
    with pytest.raises(UserError, match="question 'q' cites passage 'gone'"):
        list(convert([_question(**fields)], passages=PASSAGES))


def test_an_unknown_task_is_plain_question_answering():
    assert rule_of("never heard of") is DEFAULT_RULE
    assert _response(_question("never heard of", gold=["p1", "p2"])) == (Evidence("p1", "first", also=("p2",)),)
