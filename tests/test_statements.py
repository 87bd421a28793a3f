"""A claim becomes what its passage states, in the text and in what Gen reads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_engine import make_talkative, random_prompts

from cosup.data import Passage
from cosup.embedder import ModelEmbedder
from cosup.engine import ClaimClosed, Engine, Finished, Options, Token
from cosup.engine.row import Row
from cosup.engine.statements import MOST_WORDS, statement
from cosup.index import Hit, build_index
from cosup.model import CoSupModel
from cosup.template import Template

TEXT = (
    "Oslo lies at the head of a fjord. Founded in 1040, it has been the capital of Norway since 1814! "
    "The university of Oslo, which is the oldest in Norway, was opened by King Frederick in 1811, and it teaches "
    "27,000 students (as of 2019) in eight faculties, of which medicine is the largest."
)


def _of(question, answer, text=TEXT, **options):
    return statement(question, answer, text, **options)


def test_the_sentence_that_holds_the_answer_is_the_statement():
    assert _of("When was it founded?", "1040") == "Founded in 1040, it has been the capital of Norway since 1814!"


def test_of_several_sentences_with_the_answer_the_one_nearest_the_question_is_taken_and_of_equals_the_first():
    assert "1814" in _of("Which country has this capital?", "Norway")
    assert "oldest" in _of("Where is its oldest university?", "Norway")
    assert "1814" in _of("Why?", "Norway")


def test_a_long_sentence_gives_whole_clauses_around_the_answer_those_before_it_first():
    told = _of("By whom was the university opened?", "King Frederick", most=18)
    assert told == "The university of Oslo, which is the oldest in Norway, was opened by King Frederick in 1811"
    assert _of("How many students?", "27,000 students", most=9) == "and it teaches 27,000 students (as of 2019)"
    assert _of("As of when?", "2019", most=4) == "(as of 2019)"


def test_an_answer_over_several_clauses_is_not_cut():
    answer = "in 1811, and it teaches 27,000 students"
    assert _of("What else?", answer, most=7) == answer


def test_a_clause_too_long_by_itself_is_cut_between_words_and_keeps_the_answer():
    text = " ".join(f"w{n}" for n in range(40))
    assert _of("?", "w3", text, most=5) == "w0 w1 w2 w3 w4"
    assert _of("?", "w30", text, most=5) == "w26 w27 w28 w29 w30"
    assert _of("?", "w39", text, most=5) == "w35 w36 w37 w38 w39"


@pytest.mark.parametrize("answer", ["no", "False", "SUPPORTS", "No."])
def test_a_verdict_stays_as_it_is(answer):
    assert _of("Is it?", answer, f"It has {answer} harbour.") == answer


@pytest.mark.parametrize("answer", ["Bergen", "Nor", "", "Norway, so false", "Norway? No."])
def test_what_the_text_does_not_hold_stays_as_it_is_if_it_shares_no_word_or_ends_in_a_verdict(answer):
    assert _of("Which?", answer) == answer


def test_a_paraphrase_becomes_the_sentence_that_shares_most_words_with_it_and_the_question():
    stated = "Founded in 1040, it has been the capital of Norway since 1814!"
    assert _of("Which city?", "Norway's capital from 1814") == stated
    assert _of("Since when is it the capital?", "1815") == stated
    assert _of("Which city?", "the head of fjords") == "Oslo lies at the head of a fjord."


def test_of_a_long_sentence_a_paraphrase_becomes_the_clauses_with_most_words_in_a_row():
    assert _of("How many?", "27,000 student in 2019", most=9) == "and it teaches 27,000 students (as of 2019)"
    assert _of("Who opened it?", "old King Frederick the Great", most=6) == "was opened by King Frederick in"


def test_a_paraphrase_however_long_becomes_a_statement_and_words_over_two_sentences_stay():
    assert _of("?", "the capital " * 9, most=12) == "Founded in 1040, it has been the capital of Norway since 1814!"
    both = "a fjord. Founded in 1040"
    assert _of("?", both) == both


def test_words_of_the_title_stay_unless_a_sentence_holds_them():
    assert _of("Which city is the capital?", "Christiania", title="Oslo (Christiania)") == "Christiania"
    assert _of("Which city lies there?", "Oslo", title="Oslo") == "Oslo lies at the head of a fjord."
    assert (
        _of("Which city is the capital?", "Christiania")
        == "Founded in 1040, it has been the capital of Norway since 1814!"
    )


def test_letter_case_does_not_matter_and_special_characters_mean_themselves():
    assert _of("What?", "NORWAY", "It is in norway.") == "It is in norway."
    assert _of("What?", "a+b (c)", "They write a+b (c) here.") == "They write a+b (c) here."


def test_blanks_around_an_answer_do_not_matter():
    assert _of("What?", " Oslo ", "This is Oslo \n") == "This is Oslo"


def test_an_answer_longer_than_a_statement_stays_as_it_is():
    answer = "Founded in 1040, it has been the capital"
    assert _of("What?", answer, most=7) == answer
    assert _of("What?", answer, most=8) == answer


@pytest.mark.parametrize("answer", ["Oslo", "1814", "2019", "eight faculties", "medicine", "the largest", "students"])
@pytest.mark.parametrize("most", [2, 5, 9, MOST_WORDS])
def test_a_statement_stands_in_the_text_holds_the_answer_and_has_no_more_words_than_asked(answer, most):
    told = _of("Of what?", answer, most=most)
    assert told in TEXT
    assert answer in told
    assert len(told.split()) <= most


# In a response

NORWAY = Passage("p", "It lies far north. Oslo is the capital of Norway. It is old.", "Norway")


@pytest.fixture
def t(tiny: CoSupModel) -> Template:
    return tiny.template


def _cited(t: Template, **options) -> Row:
    """A row that may write a claim of `NORWAY`."""
    limit = options.pop("limit", 400)
    row = Row(0, t.prompt("Which city?", task=""), Options(retrieve_first=True, **options), template=t, limit=limit)
    row.read(len(row.unread))
    hit = row.choose([Hit("p", 1.0)])
    assert hit is not None
    row.insert(hit, NORWAY)
    row.read(len(row.unread))
    row.events.clear()
    return row


def _write(row: Row, *tokens: int) -> None:
    for token in tokens:
        row.write(token)
        row.read(len(row.unread))


def test_a_claim_is_reported_as_its_passage_states_it_when_it_is_closed(t: Template) -> None:
    row = _cited(t, statements=True)
    _write(row, *t.encode("Oslo"))
    assert row.events == []
    before = len(row.context) - len(t.encode("Oslo"))
    row.write(t.ce)
    assert row.context[before:] == [*t.encode("Oslo is the capital of Norway."), t.ce]
    assert row.unread == row.context[before:]  # what stood there is forgotten
    written = [event for event in row.events if isinstance(event, Token)]
    assert "".join(event.text for event in written) == "Oslo is the capital of Norway."
    assert [event.id for event in written] == row.context[before:]
    assert row.events[-1] == ClaimClosed(0, len("Oslo is the capital of Norway."))
    row.read(len(row.unread))
    row.write(t.eos)
    (finished,) = [event for event in row.events if isinstance(event, Finished)]
    assert (finished.response.text, finished.response.well_formed) == ("Oslo is the capital of Norway.", True)
    assert finished.response.tokens_sampled == len(t.encode("Oslo")) + 2


@pytest.mark.parametrize("claim", ["Bergen", "no", "Norway? No."])
def test_a_claim_that_no_sentence_comes_near_is_reported_as_it_is_and_not_read_again(claim: str, t: Template) -> None:
    row = _cited(t, statements=True)
    _write(row, *t.encode(claim))
    row.write(t.ce)
    assert row.unread == [t.ce]
    assert "".join(event.text for event in row.events if isinstance(event, Token)) == claim


def test_a_claim_cut_off_by_the_limit_of_tokens_is_stated_too(t: Template) -> None:
    ids = t.encode("Oslo")
    row = _cited(t, statements=True, max_new_tokens=len(ids))
    _write(row, *ids)
    assert isinstance(row.events[-1], Finished)
    assert row.events[-1].response.claims[0].text == "Oslo is the capital of Norway."
    assert (row.events[-1].reason, row.events[-1].response.well_formed) == ("length", False)


def test_a_response_that_ends_inside_a_claim_states_it_first(t: Template) -> None:
    row = _cited(t, statements=True)
    _write(row, *t.encode("Oslo"), t.eos)
    assert isinstance(row.events[-1], Finished)
    assert row.events[-1].response.text == "Oslo is the capital of Norway."


def test_a_statement_that_does_not_fit_the_context_stays_a_claim(t: Template) -> None:
    row = _cited(t, statements=True)
    used = len(row.context) + len(t.encode("Oslo"))
    row = _cited(t, statements=True, limit=used + 5)
    _write(row, *t.encode("Oslo"))
    row.write(t.ce)
    assert "".join(event.text for event in row.events if isinstance(event, Token)) == "Oslo"


def test_a_stop_string_in_a_statement_ends_the_response(t: Template) -> None:
    row = _cited(t, statements=True, stop=(" capital",))
    _write(row, *t.encode("Oslo"), t.ce)
    assert isinstance(row.events[-1], Finished)
    assert (row.events[-1].reason, row.events[-1].response.text) == ("stop", "Oslo is the")


@pytest.fixture
def talkative(tiny: CoSupModel, passages: list[Passage], tmp_path: Path) -> Engine:
    index = build_index(passages, ModelEmbedder(tiny), tmp_path / "index")
    make_talkative(tiny)
    options = Options(quote=True, statements=True, retrieve_first=True, max_new_tokens=24, rows=5)
    return Engine(tiny, index, options)


@pytest.mark.parametrize("forget", [False, True])
def test_an_engine_states_all_claims_alike_alone_and_beside_others(forget: bool, talkative: Engine) -> None:
    prompts = random_prompts(talkative.model, 30, seed=1)
    options = replace(talkative.options, forget_passages=forget)
    responses = talkative.generate(prompts, options=options)
    for response in responses:
        for claim in response.claims:
            (passage,) = talkative.index.get([claim.passage])
            assert claim.text in passage.text or claim.text in passage.title
            assert claim.text == response.text[claim.start : claim.end]
    bare = talkative.generate(prompts, options=replace(options, statements=False))
    longer = [len(a.text) > len(b.text) for a, b in zip(responses, bare, strict=True)]
    assert sum(longer) > 10
    alone = Engine(talkative.model, talkative.index, replace(options, rows=1, guesses=0)).generate(prompts)
    assert [response.text for response in alone] == [response.text for response in responses]


def test_what_gen_writes_behind_a_statement_follows_from_the_statement(talkative: Engine) -> None:
    t, checked = talkative.model.template, 0
    for prompt in random_prompts(talkative.model, 20, seed=2):
        ids = [*prompt]
        stream = talkative.stream(prompt)
        for event in stream:
            if isinstance(event, Token) and ids[-1] == t.ce and event.id != t.eos:
                with torch.no_grad():
                    logits_V = talkative.model.gen(torch.tensor([ids])).logits[0, -1]
                logits_V[[t.cs, t.ce]] = -torch.inf
                assert event.id == int(logits_V.argmax())
                checked += 1
            if isinstance(event, Token):
                ids.append(event.id)
    assert checked > 5
