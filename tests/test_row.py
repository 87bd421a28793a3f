import pytest

from cosup.data import Passage
from cosup.engine import ClaimClosed, Event, Finished, Inserted, Options, Retrieved, Token
from cosup.engine.row import Row
from cosup.index import Hit
from cosup.model import CoSupModel
from cosup.template import Response, Template

OSLO = Passage("oslo", "Oslo is the capital of Norway.", "Norway")
GOLD = Passage("gold", "Gold has 79.")
HITS = [Hit("oslo", 0.7), Hit("gold", 0.4)]


@pytest.fixture
def t(tiny: CoSupModel) -> Template:
    return tiny.template


def start(t: Template, limit: int = 512, **options: object) -> Row:
    row = Row(0, t.prompt("Which?", task=""), Options(**options), template=t, limit=limit)  # type: ignore[arg-type]
    row.read(len(row.unread))
    return row


def retrieve(row: Row, hits: list[Hit] = HITS) -> None:
    """What a session does after a [Ret] was read."""
    assert row.asks
    hit = row.choose(hits)
    if hit is None:
        row.withdraw()
    else:
        row.insert(hit, OSLO if hit.id == "oslo" else GOLD)
    row.read(len(row.unread))


def write(row: Row, *tokens: int) -> None:
    for token in tokens:
        assert token not in row.banned
        row.write(token)
        if not row.ended:
            row.read(len(row.unread))


def shown(row: Row) -> str:
    return "".join(event.text for event in row.events if isinstance(event, Token))


def response(row: Row) -> Response:
    last = row.events[-1]
    assert isinstance(last, Finished)
    return last.response


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events if not isinstance(event, Token)]


def test_a_ret_inside_a_claim_closes_it_and_asks_itself(t: Template) -> None:
    row = start(t, retrieve_first=True)
    retrieve(row)
    write(row, *t.encode("Oslo"), t.ret)
    assert row.context[-2:] == [t.ce, t.ret]
    assert row.asks
    retrieve(row)
    assert [event.passage_id for event in row.events if isinstance(event, Inserted)] == ["oslo", "gold"]


def test_an_end_inside_a_claim_closes_it_first(t: Template) -> None:
    row = start(t, retrieve_first=True)
    retrieve(row)
    write(row, *t.encode("Oslo"), t.eos)
    assert row.context[-2:] == [t.ce, t.eos]
    assert kinds(row.events)[-2:] == ["ClaimClosed", "Finished"]
    assert (response(row).text, response(row).reason, response(row).well_formed) == ("Oslo", "stop", False)


def test_control_tokens_can_be_chosen_only_where_they_may_stand(t: Template) -> None:
    row = start(t, max_retrievals=1)
    assert set(row.banned) == {t.cs, t.ce}
    write(row, t.ret)
    retrieve(row)
    assert set(row.banned) == {t.cs, t.ret}
    write(row, *t.encode("Oslo"), t.ce)
    assert set(row.banned) == {t.cs, t.ce, t.ret}
    assert set(start(t, mode="none").banned) == {t.cs, t.ce, t.ret}


def test_a_ret_that_finds_nothing_good_enough_is_taken_back_and_banned(t: Template) -> None:
    row = start(t, min_score=0.5)
    write(row, *t.encode("Well"))
    before = list(row.context)
    row.events.clear()
    write(row, t.ret)
    assert not row.events
    hit = row.choose([Hit("gold", 0.4)])
    assert hit is None
    row.withdraw()
    assert row.events == [Retrieved((Hit("gold", 0.4),), found=False)]
    assert row.context == before
    assert row.unread == before[-1:]
    assert t.ret in row.banned
    row.read(1)
    write(row, t.eos)
    assert response(row).nothing_found
    assert (response(row).retrieved, response(row).scores) == ((("gold",),), ((0.4,),))


def test_no_passage_comes_twice(t: Template) -> None:
    row = start(t, retrieve_first=True)
    retrieve(row)
    write(row, t.ce, t.ret)
    retrieve(row, [Hit("oslo", 0.9)])
    write(row, t.eos)
    assert [claim.passage for claim in response(row).claims] == ["oslo"]
    assert response(row).nothing_found


def test_a_forgotten_passage_leaves_its_claim(t: Template) -> None:
    row = start(t, retrieve_first=True, forget_passages=True)
    prompt = row.context[:-1]
    retrieve(row)
    claim = t.encode("Oslo it is")
    write(row, *claim)
    row.write(t.ce)
    assert row.context == [*prompt, t.cs, *claim, t.ce]
    assert row.unread == [t.cs, *claim, t.ce]


def test_a_stop_string_ends_the_response_and_no_part_of_it_is_shown(t: Template) -> None:
    row = start(t, stop=("END", "zzz"))
    for token in t.encode("Oslo E. EN ENDE"):
        if not row.ended:
            write(row, token)
    assert response(row).text == shown(row) == "Oslo E. EN "
    assert response(row).reason == "stop"


def test_what_looked_like_the_beginning_of_a_stop_string_is_shown_at_the_end(t: Template) -> None:
    row = start(t, stop=("END",))
    write(row, *t.encode("Oslo EN"))
    assert shown(row) == "Oslo "
    write(row, t.eos)
    assert shown(row) == response(row).text == "Oslo EN"


def test_a_stop_string_inside_a_claim_cuts_it(t: Template) -> None:
    row = start(t, retrieve_first=True, stop=("END",))
    retrieve(row)
    for token in t.encode("Oslo END"):
        if not row.ended:
            write(row, token)
    (claim,) = response(row).claims
    assert (claim.text, claim.start, claim.end, claim.passage) == ("Oslo ", 0, 5, "oslo")
    assert response(row).text == "Oslo "


def test_a_claim_that_a_limit_ends_is_reported_as_closed(t: Template) -> None:
    row = start(t, retrieve_first=True, max_new_tokens=1)
    retrieve(row)
    write(row, t.encode("Oslo")[0])
    assert kinds(row.events)[-3:] == ["ClaimOpened", "ClaimClosed", "Finished"]
    assert isinstance(row.events[-2], ClaimClosed)
    assert response(row).reason == "length"


def test_a_passage_is_shortened_at_a_sentence_where_the_context_is_nearly_full(t: Template) -> None:
    prompt = t.prompt("Which?", task="")
    first = t.inserted(Passage("x", "Gold."), max_tokens=99)
    row = start(t, limit=len(prompt) + 1 + len(first) + 3, retrieve_first=True)
    row.choose([Hit("x", 1.0)])
    row.insert(Hit("x", 1.0), Passage("x", "Gold. It is a very long story that can't fit."))
    assert row.unread == first
    row.read(len(first))
    write(row, t.encode("79")[0])
    assert response(row).reason == "length"
    assert response(row).shortened == ("x",)


def test_a_passage_that_fits_is_not_told_as_shortened(t: Template) -> None:
    row = start(t, limit=len(t.prompt("Which?", task="")) + 1 + len(t.inserted(OSLO, max_tokens=99)) + 2)
    write(row, t.ret)
    retrieve(row)
    write(row, t.encode("79")[0])
    assert (response(row).reason, response(row).shortened) == ("length", ())


def test_where_not_even_a_word_of_a_passage_fits_the_response_ends(t: Template) -> None:
    prompt = t.prompt("Which?", task="")
    row = start(t, limit=len(prompt) + 4, retrieve_first=True)
    retrieve(row)
    assert (response(row).reason, response(row).claims) == ("length", ())
    assert response(row).retrieved == (("oslo", "gold"),)


def test_guesses_are_what_followed_the_last_two_tokens_before(t: Template) -> None:
    row = start(t, retrieve_first=True, max_new_tokens=20)
    retrieve(row)
    passage = t.encode(f"{OSLO.title} :: {OSLO.text}")
    write(row, *passage[4:6])
    assert row.guess(5) == passage[6:11]
    assert row.guess(0) == []
    assert set(row.guess(100)).isdisjoint({t.ret, t.cs, t.ce, t.eos})
    write(row, *t.encode("zq"))
    assert row.guess(5) == []
