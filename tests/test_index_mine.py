import numpy as np
import pytest

from cosup.config import UserError
from cosup.data import Evidence, Example, Passage, Text
from cosup.index import Mined, Rules, build_index, mine


class Line:
    """A passage's vector is (1, its number): the query (0, 1) ranks them by number, the highest first."""

    fingerprint, dim = "line", 2

    def embed_passages(self, passages):
        return np.array([[1, p.meta["n"]] for p in passages], np.float32)


@pytest.fixture
def index(tmp_path):
    passages = [Passage(f"p{n}", f"text {n}", "", {"n": n}) for n in range(20)]
    return build_index(passages, Line(), tmp_path / "index")


def example(gold, also=(), *more):
    return Example("e", "squad", "?", (Text("Well, "), Evidence(gold, "c", also, ("old",)), *more))


def mined(index, one, rules):
    queries = np.tile(np.array([[0, 1]], np.float32), (len(one.evidence), 1))
    (out,) = mine([one], index, lambda group: [queries] * len(group), rules=rules)
    return [part.negatives for part in out.evidence]


def test_negatives_are_the_nearest_that_are_not_right(index):
    assert mined(index, example("p18", ("p17",)), Rules(3, margin=None)) == [("p19", "p16", "p15")]


def test_other_golds_of_the_response_are_no_negatives(index):
    two = example("p19", (), Evidence("p18", "d"))
    assert mined(index, two, Rules(2, margin=None)) == [("p17", "p16"), ("p17", "p16")]


@pytest.mark.parametrize(("margin", "expected"), [(0.0, ("p9", "p8")), (3.0, ("p7", "p6"))])
def test_what_scores_as_high_as_the_gold_is_left_out_by_the_margin(index, margin, expected):
    assert mined(index, example("p10"), Rules(2, margin=margin)) == [expected]


def test_only_the_window_of_ranks_is_looked_at(index):
    assert mined(index, example("p19"), Rules(8, ranks=(3, 5), margin=None)) == [("p16", "p15", "p14")]


def test_passages_that_say_the_same_as_the_gold_are_left_out(index):
    index.add([Passage("twin", "TEXT  19", "", {"n": 18.5})], np.array([[1, 18.5]], np.float32))
    assert mined(index, example("p19"), Rules(1, margin=None)) == [("p18",)]


def test_the_rest_of_an_example_stays_and_the_counts_say_what_was_found(index):
    counts = Mined()
    asked = [example("p0"), Example("plain", "squad", "?", (Text("no"),))]
    one, plain = mine(
        asked,
        index,
        lambda group: [np.array([[0, 1]] * len(e.evidence), np.float32).reshape(-1, 2) for e in group],
        rules=Rules(4),
        counts=counts,
    )
    assert one.response[0] == Text("Well, ")
    assert plain == asked[1]
    assert (counts.retrievals, counts.negatives, counts.without) == (1, 0, 1)  # nothing scores below p0


def test_a_passage_that_the_index_does_not_hold_is_named(index):
    with pytest.raises(UserError, match="example 'e' cites passage 'gone'"):
        mined(index, example("gone"), Rules())


@pytest.mark.parametrize("wrong", [{"count": 0}, {"ranks": (0, 5)}, {"ranks": (6, 5)}])
def test_rules_that_can_find_nothing_are_refused(wrong):
    with pytest.raises(UserError):
        Rules(**wrong)
