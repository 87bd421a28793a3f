import re
import string
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("countryinfo", reason="needs cosup[worldfacts]")
pytest.importorskip("pycountry", reason="needs cosup[worldfacts]")
pytest.importorskip("periodictable", reason="needs cosup[worldfacts]")

from cosup.config import UserError
from cosup.data import Passage, Question, read_passages, read_questions
from cosup.data.worldfacts import Worldfacts, build_worldfacts, worldfacts
from cosup.data.worldfacts.facts import mentions
from cosup.data.worldfacts.wording import PASSAGES, RELATIONS

FILES = ("passages.jsonl", "train.jsonl", "dev.jsonl", "test.jsonl")
SINGLE = ("worldfacts-slot", "worldfacts-qa", "worldfacts-claim")


@pytest.fixture(scope="module")
def data() -> Worldfacts:
    return worldfacts()


@pytest.fixture(scope="module")
def corpus(data: Worldfacts) -> dict[str, Passage]:
    return {passage.id: passage for passage in data.passages}


@pytest.fixture(scope="module")
def everything(data: Worldfacts) -> list[Question]:
    return [*data.train, *data.dev, *data.test]


def of_task(questions: list[Question], *tasks: str) -> list[Question]:
    return [question for question in questions if question.task in tasks]


def normal(text: str) -> str:
    """Lower case, no punctuation, no articles: as answers are compared."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in {"a", "an", "the"})


def holds(passage: Passage, answer: str) -> bool:
    return f" {normal(answer)} " in f" {normal(passage.title + ' ' + passage.text)} "


def test_there_is_as_much_as_promised(data, everything):
    assert len(data.passages) >= 1500
    assert len(everything) >= 6000
    assert len(data.dev) >= 400
    assert len(data.test) >= 800


def test_the_summary_counts_what_is_there(data):
    summary = data.summary
    assert summary.entities == len({passage.title for passage in data.passages})
    assert (summary.passages, summary.train) == (len(data.passages), len(data.train))
    assert (summary.dev, summary.test) == (len(data.dev), len(data.test))


def test_each_kind_of_question_has_its_share_of_each_split(data):
    shares = {"worldfacts-slot": 0.35, "worldfacts-qa": 0.35, "worldfacts-claim": 0.2, "worldfacts-hop": 0.1}
    for split in (data.train, data.dev, data.test):
        counts = Counter(question.task for question in split)
        assert set(counts) == set(shares)
        for task, share in shares.items():
            assert counts[task] / len(split) == pytest.approx(share, abs=0.03)


def test_each_entity_has_five_or_more_passages(data):
    assert min(Counter(passage.title for passage in data.passages).values()) >= 5


def test_passages_of_an_entity_tell_different_sides(data):
    sides = Counter((passage.title, passage.meta["tags"][1]) for passage in data.passages)
    assert max(sides.values()) == 1


def test_ids_are_unique_and_readable(data, corpus, everything):
    assert len(corpus) == len(data.passages)
    assert len({question.id for question in everything}) == len(everything)
    assert corpus["norway-capital"].title == "Norway"
    assert "Oslo" in corpus["norway-capital"].text
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", passage.id) for passage in data.passages)


def test_passages_are_short_and_distinct(data):
    lengths = [len(passage.text.split()) for passage in data.passages]
    assert 15 <= sum(lengths) / len(lengths) <= 20
    assert min(lengths) >= 10
    assert max(lengths) <= 40
    assert len({passage.text for passage in data.passages}) == len(data.passages)


def test_questions_are_short_and_distinct(everything):
    assert max(len(question.question.split()) for question in everything) <= 20
    assert len({(question.task, question.question) for question in everything}) == len(everything)


def test_nothing_is_left_of_a_template(data, everything):
    texts = [passage.text for passage in data.passages] + [question.question for question in everything]
    assert not [text for text in texts if re.search(r"[{}]|\bNone\b|\b(a|an|the|bonded) the\b|  ", text)]


def test_every_gold_passage_exists(corpus, everything):
    assert {passage for question in everything for passage in question.gold} <= set(corpus)


def test_single_hop_questions_have_one_gold_passage_of_the_entity_they_name(corpus, everything):
    for question in of_task(everything, *SINGLE):
        (gold,) = question.gold
        assert corpus[gold].title.lower() in question.question.lower()


def test_the_preferred_answer_stands_in_the_gold_passage(corpus, everything):
    for question in of_task(everything, "worldfacts-slot", "worldfacts-qa", "worldfacts-hop"):
        assert holds(corpus[question.gold[-1]], question.answers[0]), question


def test_answers_are_short(everything):
    assert all(1 <= len(answer.split()) <= 6 for question in everything for answer in question.answers)


def test_no_other_passage_of_the_entity_gives_the_answer_away(data, corpus, everything):
    by_title: dict[str, list[Passage]] = {}
    for passage in data.passages:
        by_title.setdefault(passage.title, []).append(passage)
    for question in of_task(everything, "worldfacts-slot", "worldfacts-qa"):
        gold = corpus[question.gold[0]]
        others = [passage.text for passage in by_title[gold.title] if passage.id != gold.id]
        assert not [text for text in (gold.title, *others) if mentions(text, question.answers[0])], question


def test_splits_share_no_entity(data, corpus):
    train, dev, test = (
        {corpus[gold].title for question in split for gold in question.gold}
        for split in (data.train, data.dev, data.test)
    )
    assert not train & dev
    assert not train & test
    assert not dev & test
    assert train | dev | test == {passage.title for passage in data.passages}
    assert len(train) / len(train | dev | test) == pytest.approx(0.7, abs=0.01)


def test_claims_are_balanced_in_each_split(data):
    for split in (data.train, data.dev, data.test):
        labels = Counter(question.label for question in of_task(split, "worldfacts-claim"))
        assert set(labels) == {"true", "false"}
        assert abs(labels["true"] - labels["false"]) <= 1


def test_a_claim_is_true_just_if_it_names_the_value_that_the_slot_asks_for(everything):
    values = {slot.id.removeprefix("slot-"): slot.answers[0] for slot in of_task(everything, "worldfacts-slot")}
    for claim in of_task(everything, "worldfacts-claim"):
        assert claim.answers == [claim.label]
        said = values[claim.id.removeprefix("claim-")].lower()
        assert mentions(claim.question.lower(), said) == (claim.label == "true"), claim


def test_hops_lead_through_the_first_passage_to_the_second(corpus, everything):
    for hop in of_task(everything, "worldfacts-hop"):
        first, second = (corpus[gold] for gold in hop.gold)
        through, final = hop.qa_pairs
        assert first.id != second.id
        assert holds(first, through.short_answers[0]), hop
        assert normal(through.short_answers[0]) == normal(second.title)
        assert final.short_answers == hop.answers
        assert second.title.lower() in final.question.lower()


def test_a_hop_does_not_name_the_entity_in_between(everything):
    for hop in of_task(everything, "worldfacts-hop"):
        assert not mentions(hop.question.lower(), hop.qa_pairs[0].short_answers[0].lower()), hop


def test_some_hops_lead_from_one_entity_to_another(data, corpus):
    for split in (data.train, data.test):
        hops = of_task(split, "worldfacts-hop")
        assert any(corpus[hop.gold[0]].title != corpus[hop.gold[1]].title for hop in hops)


def test_every_side_has_passages_and_questions(data, everything):
    assert {passage.meta["tags"][1] for passage in data.passages} == set(PASSAGES)
    assert {side for side, _ in RELATIONS} == set(PASSAGES)
    assert {gold.rpartition("-")[2] for question in everything for gold in question.gold} == set(PASSAGES)


@pytest.mark.parametrize(
    ("passage", "values"),
    [
        ("norway-currency", ("Norwegian Krone", "NOK")),
        ("portugal-borders", ("Spain", "one")),
        ("poland-borders", ("seven", "Belarus", "Ukraine")),
        ("austria-language", ("German",)),
        ("japan-code", ("JPN", "392")),
        ("kenya-calling", ("+254",)),
        ("united-kingdom-domain", (".uk",)),
        ("iron-symbol", ("Fe", "26")),
        ("iron-next", ("cobalt",)),
        ("iron-place", ("8", "4")),
        ("lead-place", ("14", "6")),
        ("helium-place", ("18", "1")),
        ("hydrogen-place", ("1",)),
        ("gold-mass", ("196.96657",)),
        ("copper-density", ("8.96",)),
        ("tin-isotopes", ("ten", "tin-120")),
        ("silicon-lattice", ("diamond cubic",)),
        ("carbon-radius", ("76",)),
    ],
)
def test_well_known_facts_are_right(corpus, passage, values):
    assert all(mentions(corpus[passage].text, value) for value in values), corpus[passage].text


@pytest.mark.parametrize("passage", ["singapore-capital", "sri-lanka-capital", "lanthanum-place", "zimbabwe-currency"])
def test_doubtful_facts_and_those_that_a_title_tells_are_left_out(corpus, passage):
    entity = passage.rpartition("-")[0]
    assert any(other.startswith(f"{entity}-") for other in corpus)
    assert passage not in corpus


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path):
    build_worldfacts(tmp_path / "a", seed=3)
    build_worldfacts(tmp_path / "b", seed=3)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_seed_splits_and_words_differently_but_tells_the_same_sides(data):
    other = worldfacts(1)
    assert [passage.id for passage in other.passages] == [passage.id for passage in data.passages]
    assert [passage.text for passage in other.passages] != [passage.text for passage in data.passages]
    assert [question.id for question in other.test] != [question.id for question in data.test]


def test_what_is_written_is_read_back_equal(tmp_path: Path, data):
    summary = build_worldfacts(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    assert list(read_passages(tmp_path / "out" / "passages.jsonl")) == data.passages
    for split in ("train", "dev", "test"):
        assert list(read_questions(tmp_path / "out" / f"{split}.jsonl")) == getattr(data, split)
    assert summary == data.summary


@pytest.mark.parametrize("package", ["countryinfo", "pycountry", "periodictable"])
def test_a_missing_package_names_the_command_and_writes_nothing(tmp_path: Path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*pip install 'cosup\[worldfacts\]'"):
        build_worldfacts(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_every_question_has_a_statement_that_holds_its_answer(everything):
    for question in everything:
        (statement,) = question.long_answers
        assert normal(question.answers[0]) in normal(statement), question
        assert len(statement.split()) <= 20
