import random
from collections import Counter

import ir_measures
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR, P, R, Rprec, Success

from cosup import metrics

WORDS = st.lists(st.sampled_from(["red", "green", "blue", "été"]), max_size=6).map(" ".join)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("a cat, an owl and the dog", "cat owl and dog"),
        ("theatre of Athens", "theatre of athens"),
        ("state-of-the-art", "stateoftheart"),
        ("U.S.A.", "usa"),
        ("  two\t words \n", "two words"),
        ("Beyoncé ÉTÉ", "beyoncé été"),
        ("«2,5 €»", "«25 €»"),
        ("—the end—", "— end—"),
        ("!?.,", ""),
        ("A the an", ""),
        ("", ""),
    ],
)
def test_normalizing_follows_squad(text, normalized):
    assert metrics.normalize_answer(text) == normalized


@given(st.text())
def test_normalizing_strips_case_and_surrounding_space(text):
    normalized = metrics.normalize_answer(text)
    assert normalized == normalized.lower()
    assert normalized == " ".join(normalized.split())


@pytest.mark.parametrize(
    ("text", "answers", "found"),
    [
        ("It was built in 1889.", ["1889"], True),
        ("It was built in 18890.", ["1889"], False),
        ("the New York-based firm", ["New York"], False),
        ("born in New  York, in May", ["the new york"], True),
        ("any text", ["text", "nothing"], True),
        ("any text", [], False),
        ("any text", ["", "the", "?!"], False),
        ("", ["word"], False),
        ("", [""], False),
    ],
)
def test_an_answer_is_found_as_whole_words(text, answers, found):
    assert metrics.answer_in(text, answers) is found


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower", ["eiffel tower!"], 1.0, 1.0),
        ("the tower", ["Eiffel Tower"], 0.0, 2 / 3),
        ("in Paris in France", ["Paris, France"], 0.0, 2 * 2 / (4 + 2)),
        ("so so so", ["so so"], 0.0, 2 * 2 / (3 + 2)),
        ("Tower Eiffel", ["Eiffel Tower"], 0.0, 1.0),
        ("Rome", ["Paris", "Rome Italy"], 0.0, 2 / 3),
        ("Rome", ["Paris", "Rome"], 1.0, 1.0),
        ("Beyoncé", ["Beyonce"], 0.0, 0.0),
        ("ÉTÉ", ["été"], 1.0, 1.0),
        ("...", ["Rome"], 0.0, 0.0),
        ("", ["Rome"], 0.0, 0.0),
        ("Rome", [], 0.0, 0.0),
        ("the", ["a"], 0.0, 0.0),
        ("", [""], 0.0, 0.0),
    ],
)
def test_exact_match_and_f1_of_hand_worked_answers(text, answers, exact, f1):
    assert metrics.exact_match(text, answers) == exact
    assert metrics.token_f1(text, answers) == pytest.approx(f1)


@given(WORDS, WORDS)
def test_f1_is_symmetric_in_prediction_and_single_answer(one, other):
    assert metrics.token_f1(one, [other]) == metrics.token_f1(other, [one])


@given(WORDS, WORDS)
def test_f1_is_one_exactly_where_the_bags_of_words_are_equal(text, answer):
    same_bag = bool(text) and Counter(text.split()) == Counter(answer.split())
    assert (metrics.token_f1(text, [answer]) == 1.0) is same_bag


@given(st.text(), st.lists(st.text()))
def test_an_exact_match_is_also_found_and_has_f1_one(text, answers):
    if metrics.exact_match(text, [*answers, text]):
        assert metrics.token_f1(text, [*answers, text]) == 1.0
        assert metrics.answer_in(text, [*answers, text])


@given(WORDS, st.lists(WORDS), WORDS)
def test_another_answer_never_lowers_a_score(text, answers, another):
    for score in (metrics.exact_match, metrics.token_f1, metrics.answer_in):
        assert score(text, [*answers, another]) >= score(text, answers)


def test_retrieval_metrics_of_a_hand_worked_ranking():
    ranked, gold = ["x", "a", "y", "b"], ["a", "b", "c"]
    assert metrics.success_at(ranked, gold, k=1) == 0.0
    assert metrics.success_at(ranked, gold, k=2) == 1.0
    assert metrics.recall_at(ranked, gold, k=4) == pytest.approx(2 / 3)
    assert metrics.precision_at(ranked, gold, k=4) == 0.5
    assert metrics.precision_at(ranked, gold, k=10) == 0.2
    assert metrics.reciprocal_rank(ranked, gold) == 0.5
    assert metrics.r_precision(ranked, gold) == pytest.approx(1 / 3)


def test_an_empty_ranking_scores_zero():
    assert metrics.success_at([], ["a"], k=1) == 0.0
    assert metrics.recall_at([], ["a"], k=1) == 0.0
    assert metrics.precision_at([], ["a"], k=1) == 0.0
    assert metrics.reciprocal_rank([], ["a"]) == 0.0
    assert metrics.r_precision([], ["a"]) == 0.0


def test_gold_named_twice_counts_once():
    assert metrics.recall_at(["a"], ["a", "a"], k=1) == 1.0
    assert metrics.r_precision(["a"], ["a", "a"]) == 1.0


@pytest.mark.parametrize("metric", [metrics.success_at, metrics.recall_at, metrics.precision_at])
def test_metrics_at_k_refuse_no_gold_and_k_below_one(metric):
    with pytest.raises(ValueError, match="no gold"):
        metric(["a"], [], k=1)
    with pytest.raises(ValueError, match="k is 0, and must be 1 or more"):
        metric(["a"], ["a"], k=0)


@pytest.mark.parametrize("metric", [metrics.reciprocal_rank, metrics.r_precision])
def test_metrics_of_the_whole_ranking_refuse_no_gold(metric):
    with pytest.raises(ValueError, match="no gold"):
        metric(["a"], set())


def _random_rankings(count):
    """Rankings of up to 30 of 60 ids, some short, some without any gold, with 1 to 8 gold ids each."""
    rng = random.Random(0)
    ids = [f"p{number}" for number in range(60)]
    for number in range(count):
        yield f"q{number}", rng.sample(ids, rng.randint(1, 30)), rng.sample(ids, rng.randint(1, 8))


@pytest.mark.parametrize(
    ("measure", "ours"),
    [(RR, metrics.reciprocal_rank), (Rprec, metrics.r_precision)]
    + [
        (measure @ k, lambda ranked, gold, k=k, ours=ours: ours(ranked, gold, k=k))
        for k in (1, 5, 20)
        for measure, ours in [(Success, metrics.success_at), (R, metrics.recall_at), (P, metrics.precision_at)]
    ],
    ids=str,
)
def test_retrieval_metrics_agree_with_trec_eval(measure, ours):
    rankings = list(_random_rankings(300))
    run = {query: {id: -float(rank) for rank, id in enumerate(ranked)} for query, ranked, _ in rankings}
    qrels = {query: dict.fromkeys(gold, 1) for query, _, gold in rankings}
    theirs = {result.query_id: result.value for result in ir_measures.iter_calc([measure], qrels, run)}
    assert len(theirs) == len(rankings)
    for query, ranked, gold in rankings:
        assert ours(ranked, gold) == pytest.approx(theirs[query])
