import random
from collections import Counter

import ir_measures
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR, P, R, Rprec, Success
from rouge_score.rouge_scorer import RougeScorer
from torchmetrics.functional.text import squad

from cosup import metrics
from cosup.metrics import spaces

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


def _random_texts(count):
    """Predictions and references of few words, so that ties and repeats are common: empty, accented, punctuated."""
    rng = random.Random(1)
    words = [
        "the",
        "a",
        "An",
        "Oslo",
        "oslo",
        "été",
        "U.S.",
        "2,5",
        "so-so",
        "the,",
        "—",
        "東京",
        "run",
        "Run!",
        "",
        "x1",
    ]
    for _ in range(count):
        text = " ".join(rng.choices(words, k=rng.randint(0, 9)))
        yield text, [" ".join(rng.choices(words, k=rng.randint(0, 7))) for _ in range(rng.randint(1, 3))]


def test_exact_match_and_f1_agree_with_torchmetrics_squad():
    compared = 0
    for text, answers in _random_texts(1000):
        kept = [answer for answer in answers if metrics.normalize_answer(answer)]
        if not kept or not metrics.normalize_answer(text):
            assert metrics.exact_match(text, answers) == metrics.token_f1(text, answers) == 0.0
            continue
        compared += 1
        theirs = squad(
            [{"prediction_text": text, "id": "q"}],
            [{"answers": {"answer_start": [0] * len(kept), "text": kept}, "id": "q"}],
        )
        assert metrics.exact_match(text, kept) == float(theirs["exact_match"]) / 100
        assert metrics.token_f1(text, kept) == pytest.approx(float(theirs["f1"]) / 100, abs=1e-6)
    assert compared > 500


def test_rouge_l_agrees_with_rouge_score():
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scored = 0
    for text, references in _random_texts(1000):
        theirs = max(scorer.score(reference, text)["rougeL"].fmeasure for reference in references)
        assert metrics.rouge_l(text, references) == pytest.approx(theirs)
        scored += 0 < theirs < 1
    assert scored > 300


def test_rouge_l_of_long_texts_agrees_with_rouge_score():
    rng = random.Random(2)
    words = [f"w{number}" for number in range(40)]
    scorer = RougeScorer(["rougeL"])
    for _ in range(20):
        text, reference = (" ".join(rng.choices(words, k=rng.randint(100, 300))) for _ in range(2))
        assert metrics.rouge_l(text, [reference]) == pytest.approx(scorer.score(reference, text)["rougeL"].fmeasure)


@pytest.mark.parametrize(
    ("text", "readings", "share"),
    [
        ("Rupert Grint, and Chris Rankin.", [["rupert grint"], ["Chris Rankin", "C. R."], ["James Phelps"]], 2 / 3),
        ("Oslo", [["Oslo"], ["oslo!"]], 1.0),
        ("Osloer", [["Oslo"]], 1.0),
        ("Oslo", [[""], ["the"]], 0.0),
        ("", [["Oslo"]], 0.0),
        ("Oslo", [], 0.0),
    ],
)
def test_string_em_is_the_share_of_readings_of_which_an_answer_stands_in_the_text(text, readings, share):
    assert metrics.string_em(text, readings) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("188, so true", "true"),
        ("TRUE!", "true"),
        ("true or false", ""),
        ("untrue", ""),
        ("", ""),
    ],
)
def test_a_verdict_is_the_only_label_that_was_said(text, said):
    assert metrics.verdict(text, ["true", "false"]) == said


def test_gold_alternatives_need_one_of_them_first_and_hops_all_of_them():
    ranked = ["a", "x", "b"]
    assert metrics.best_r_precision(ranked, [["a"], ["b"]]) == 1.0
    assert metrics.best_r_precision(ranked, [["a", "b"]]) == 0.5
    assert metrics.first_of_each(["a", "a", "b", "a"]) == ["a", "b"]
    with pytest.raises(ValueError, match="no gold"):
        metrics.best_r_precision(ranked, [])


# Worked by hand from section 3 of the ALCE paper. `true` are the pairs that the fake model entails; passages are read
# together with a line break between them.
@pytest.mark.parametrize(
    ("statements", "true", "recall", "precision"),
    [
        pytest.param([("s", ["p"])], {("p", "s")}, 1.0, 1.0, id="one citation that entails"),
        pytest.param([("s", ["p"])], set(), 0.0, 0.0, id="one citation that does not"),
        pytest.param([("s", [])], set(), 0.0, 0.0, id="no citation"),
        pytest.param([], set(), 0.0, 0.0, id="no statement"),
        pytest.param([("s", ["p"]), ("t", [])], {("p", "s")}, 0.5, 1.0, id="a tail that cites nothing"),
        pytest.param([("s", ["p", "q"])], {("p\nq", "s")}, 1.0, 1.0, id="both needed together"),
        pytest.param(
            [("s", ["p", "q"])], {("p\nq", "s"), ("p", "s")}, 1.0, 0.5, id="the second neither entails nor is missed"
        ),
        pytest.param(
            [("s", ["p", "q"])], {("p\nq", "s"), ("p", "s"), ("q", "s")}, 1.0, 1.0, id="each entails by itself"
        ),
        pytest.param([("s", ["p", "q"])], {("p", "s")}, 0.0, 0.0, id="not entailed together, so none is precise"),
        pytest.param(
            [("s", ["p", "q", "r"])],
            {("p\nq\nr", "s"), ("p\nq", "s"), ("p\nr", "s")},
            1.0,
            1 / 3,
            id="of three the first is needed, either other will do",
        ),
        pytest.param(
            [("s", ["p"]), ("t", ["p", "q"]), ("u", ["q"])],
            {("p", "s"), ("p\nq", "t"), ("q", "t")},
            2 / 3,
            2 / 4,
            id="several statements are counted together",
        ),
    ],
)
def test_citation_recall_and_precision_of_hand_worked_cases(statements, true, recall, precision):
    made = [metrics.Statement(text, tuple(passages)) for text, passages in statements]
    announced = set(metrics.citation_pairs(made))

    def entails(pair):
        assert pair in announced
        return pair in true

    scores = metrics.citation_scores(made, entails)
    assert scores.recall == pytest.approx(recall)
    assert scores.precision == pytest.approx(precision)


def test_claim_recall_is_the_share_of_claims_that_the_answer_entails():
    assert metrics.claim_recall("answer", ["one", "two"], lambda pair: pair == ("answer", "two")) == 0.5
    assert metrics.claim_recall("answer", [], lambda pair: True) == 0.0


def test_the_interval_of_a_mean_agrees_with_scipy():
    values = np.random.default_rng(0).binomial(1, 0.3, 400).astype(float)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=1)
    (ours,) = metrics.bootstrap_intervals(values[:, None], resamples=2000)
    assert ours == pytest.approx(theirs.confidence_interval, abs=0.006)


def test_an_interval_counts_only_the_questions_that_have_the_metric():
    values = np.random.default_rng(0).random(300)
    sparse = np.full((600, 2), np.nan)
    sparse[::2, 0] = values
    sparse[:, 1] = 0.25
    bounds = metrics.bootstrap_intervals(sparse)
    assert bounds[0] == pytest.approx([values.mean() - 0.033, values.mean() + 0.033], abs=0.01)
    assert bounds[1] == pytest.approx([0.25, 0.25])
    assert np.isnan(metrics.bootstrap_intervals(np.full((3, 1), np.nan))).all()


def test_the_reduction_rate_of_equal_columns_is_surely_zero_and_of_nothing_unknown():
    whole = np.array([1.0, 0.0, 1.0, 1.0])
    assert metrics.bootstrap_reduction(whole, whole) == (0.0, 0.0)
    low, high = metrics.bootstrap_reduction(whole, whole * np.array([1, 1, 1, 0]))
    assert low < 1 / 3 < high
    assert np.isnan(metrics.bootstrap_reduction(whole * 0, whole * 0)).all()


def test_the_paired_test_agrees_with_scipys_permutation_test():
    rng = np.random.default_rng(3)
    first = rng.binomial(1, 0.4, 60).astype(float)
    second = np.clip(first + rng.binomial(1, 0.12, 60) - rng.binomial(1, 0.03, 60), 0, 1)
    theirs = scipy.stats.permutation_test(
        (second, first), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=20000, rng=1
    )
    ours = metrics.paired_difference(first[None], second[None])
    assert ours.value == pytest.approx((second - first).mean())
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.015)
    assert ours.low <= ours.value <= ours.high
    assert (ours.questions, ours.seeds) == (60, (1, 1))


def test_equal_runs_do_not_differ_and_seeds_widen_the_interval():
    rng = np.random.default_rng(4)
    same = rng.binomial(1, 0.5, (1, 100)).astype(float)
    assert metrics.paired_difference(same, same).p == 1.0
    steady = metrics.paired_difference(np.zeros((2, 100)), np.full((2, 100), 0.2))
    unsteady = metrics.paired_difference(np.zeros((2, 100)), np.stack([np.zeros(100), np.full(100, 0.4)]))
    assert (steady.value, unsteady.value) == pytest.approx((0.2, 0.2))
    assert steady.high - steady.low == pytest.approx(0.0)
    assert unsteady.high - unsteady.low > 0.3
    with pytest.raises(ValueError, match="questions differ"):
        metrics.paired_difference(same, same[:, :5])


def test_alignment_and_uniformity_are_those_of_their_definition():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 6))
    tx, ty = (torch.nn.functional.normalize(torch.tensor(v), dim=1) for v in (x, y))
    assert spaces.alignment(x, y) == pytest.approx(float((tx - ty).norm(dim=1).pow(2).mean()))
    assert spaces.uniformity(x) == pytest.approx(float(torch.pdist(tx).pow(2).mul(-2).exp().mean().log()))


def test_the_effective_rank_counts_directions():
    assert spaces.effective_rank(np.ones((5, 4))) == 1.0
    axes = np.concatenate([np.eye(4), -np.eye(4)])
    assert spaces.effective_rank(axes) == pytest.approx(4.0)
    line = np.array([[1.0, 0, 0], [-1.0, 0, 0], [2.0, 0, 0], [-3.0, 0, 0]])
    assert spaces.effective_rank(line) == pytest.approx(1.0)


def test_hubness_is_the_skewness_of_how_often_each_is_found():
    found = np.array([[0, 1], [0, 2], [0, 3]])
    assert spaces.hubness(found, 5) == pytest.approx(scipy.stats.skew([3, 1, 1, 1, 0]))
    assert spaces.hubness(np.array([[0], [1]]), 2) == 0.0


def test_a_rotation_is_drift_but_none_up_to_rotation():
    rng = np.random.default_rng(6)
    before = rng.normal(size=(30, 5))
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    assert spaces.drift(before, before) == pytest.approx(0.0)
    assert spaces.drift(before, -before) == pytest.approx(2.0)
    assert spaces.drift(before, before @ rotation) > 0.3
    assert spaces.drift_up_to_rotation(before, before @ rotation) == pytest.approx(0.0, abs=1e-9)
    found = spaces.nearest(before, before, 3)
    assert found[:, 0].tolist() == list(range(30))
    assert spaces.overlap(found, spaces.nearest(before @ rotation, before @ rotation, 3)) == 1.0
    assert spaces.overlap(np.array([[0, 1]]), np.array([[1, 2]])) == 0.5
