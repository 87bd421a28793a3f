"""A quotation is whole words of its passage, and any words of it can be quoted."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_engine import make_talkative, random_prompts

from cosup.data import Passage
from cosup.embedder import ModelEmbedder
from cosup.engine import Engine, Options
from cosup.engine.quotes import Quotes, text_read
from cosup.engine.row import Row
from cosup.index import Hit, build_index
from cosup.model import CoSupModel
from cosup.template import Template

PASSAGE = Passage(
    "p",
    'Zürich, the "largest city", had 443,037 people in 2020 (1.4 million with its surroundings). 東京 is larger; so is '
    "Kraków.",
    "Zürich (city)",
)


@pytest.fixture
def t(tiny: CoSupModel) -> Template:
    return tiny.template


def test_whatever_is_chosen_is_whole_words_of_title_or_text(t: Template) -> None:
    quotes, rng = Quotes(PASSAGE.title, PASSAGE.text, t), random.Random(0)
    found = set()
    for _ in range(300):
        claim: list[int] = []
        while True:
            following, ends = quotes.next(claim)
            assert claim or not ends
            if ends and (not following or rng.random() < 0.3):
                break
            claim.append(rng.choice(following))
        text = t.decode(claim)
        assert re.search(rf"(?<!\w){re.escape(text)}(?!\w)", PASSAGE.title) or text in PASSAGE.text
        found.add(text)
    assert {"443,037", "2020"} <= {word for text in found for word in text.split()}
    assert not found & {"443", "1", "Kr", "Zür"}  # pieces of words


@pytest.mark.parametrize(
    "quoted", ["Zürich", "largest city", '"largest city"', "443,037 people", "東京 is larger", "Kraków", "Kraków."]
)
def test_words_can_be_quoted_with_and_without_the_marks_around_them(quoted: str, t: Template) -> None:
    quotes, claim = Quotes(PASSAGE.title, PASSAGE.text, t), t.encode(quoted)
    for count, token in enumerate(claim):
        assert token in quotes.next(claim[:count])[0]
    assert quotes.next(claim)[1]


@pytest.mark.parametrize("text", ["…", "\N{ZERO WIDTH SPACE}", "-- --"])
def test_of_a_passage_without_words_its_marks_are_quoted(text: str, t: Template) -> None:
    following, ends = Quotes("", text, t).next([])
    assert following or ends


def test_nothing_is_quoted_that_was_not_read(t: Template) -> None:
    long = Passage("p", "Oslo is a city. " * 30 + "Gold is not.", "Norway")
    row = Row(0, t.prompt("?", task=""), Options(quote=True, retrieve_first=True), template=t, limit=90)
    row.read(len(row.unread))
    hit = row.choose([Hit("p", 1.0)])
    assert hit is not None
    row.insert(hit, long)
    assert not {t.encode("Gold")[0], t.encode("not")[0]} & set(row.allowed or ())
    assert t.encode("Oslo")[0] in (row.allowed or ())


def test_of_a_title_that_was_cut_no_text_was_read(t: Template) -> None:
    passage = Passage("p", "Zebras were first seen here. " * 30, "A long title of many words. " * 9)
    ids = t.encode(t.passage_text(passage))
    assert text_read(passage, ids[:20], t) == ""
    assert text_read(passage, ids, t) == passage.text


@pytest.mark.parametrize("rows", [1, 5])
def test_an_engine_that_quotes_writes_no_claim_that_is_not_in_its_passage(
    rows: int, tiny: CoSupModel, passages: list[Passage], tmp_path: Path
) -> None:
    index = build_index(passages, ModelEmbedder(tiny), tmp_path / "index")
    make_talkative(tiny)
    prompts = random_prompts(tiny, 40, seed=rows)
    options = Options(quote=True, retrieve_first=True, max_new_tokens=24, rows=rows)
    each = [replace(options, temperature=0.3 * (i % 2), seed=i) for i in range(len(prompts))]
    responses = Engine(tiny, index, options).generate(prompts, options=each)
    closed = 0
    for response in responses:
        for claim in response.claims:
            (passage,) = index.get([claim.passage])
            assert claim.text in passage.text or claim.text in passage.title
            closed += 1
        assert response.well_formed or response.reason == "length"
    assert closed > 40
    free = Engine(tiny, index, options).generate(prompts, options=[replace(o, quote=False) for o in each])
    assert any(claim.text not in index.get([claim.passage])[0].text for response in free for claim in response.claims)
