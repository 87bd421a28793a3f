from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cosup.config import UserError
from cosup.data import Passage
from cosup.engine import Engine, Event, Finished, Options, Session, Token
from cosup.engine.reader import Chunk, Reader
from cosup.index import FaissIndex, Hit, build_index
from cosup.model import CoSupModel
from cosup.template import Response


@pytest.fixture
def index(tiny: CoSupModel, passages: list[Passage], tmp_path: Path) -> FaissIndex:
    return build_index(passages, tiny, tmp_path / "index")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[Chunk]]:
    """The chunks of every step that pass through Gen."""
    steps: list[list[Chunk]] = []
    plain = Reader.read

    def spied(self: Reader, chunks: Sequence[Chunk]) -> Any:
        steps.append(list(chunks))
        return plain(self, chunks)

    monkeypatch.setattr(Reader, "read", spied)
    return steps


def drain(session: Session) -> Iterator[tuple[int, Event]]:
    while session.active or session.waiting:
        yield from session.step()


def responses(session: Session) -> dict[int, Response]:
    return {request: event.response for request, event in drain(session) if isinstance(event, Finished)}


def essence(response: Response) -> tuple[object, ...]:
    cited = [(claim.text, claim.passage) for claim in response.claims]
    return response.text, cited, response.retrieved, response.reason, response.tokens_sampled, response.tokens_read


def test_requests_wait_for_a_free_row_and_join_while_others_go_on(tiny: CoSupModel, index: FaissIndex) -> None:
    session = Engine(tiny, index, Options(rows=2)).session()
    assert session.step() == []
    long = Options(max_new_tokens=30, mode="none")
    short = Options(max_new_tokens=2, mode="none")
    requests = [session.submit("gold?", options=options) for options in (long, short, short, short)]
    assert (session.active, session.waiting) == (0, 4)
    session.step()
    assert (session.active, session.waiting) == (2, 2)
    order = [request for request, event in drain(session) if isinstance(event, Finished)]
    assert order == [requests[1], requests[2], requests[3], requests[0]]
    assert (session.active, session.waiting) == (0, 0)
    assert session.step() == []


def test_requests_that_join_at_any_time_get_the_response_that_they_get_alone(
    tiny: CoSupModel, index: FaissIndex
) -> None:
    prompts = [f"which metal is number {n}? " + "gold " * (n % 7) for n in range(24)]
    options = [Options(max_new_tokens=3 + n % 9, retrieve_first=n % 3 == 0, seed=n) for n in range(24)]
    alone = [Engine(tiny, index).generate([p], options=o)[0] for p, o in zip(prompts, options, strict=True)]
    session = Engine(tiny, index, Options(rows=5)).session()
    joined: dict[int, Response] = {}
    left = list(zip(prompts, options, strict=True))
    while left or session.active or session.waiting:
        for prompt, own in left[:2]:
            session.submit(prompt, options=own)
        left = left[2:]
        for request, event in [*session.step(), *session.step()]:
            if isinstance(event, Finished):
                joined[request] = event.response
    assert [essence(joined[n]) for n in range(24)] == [essence(response) for response in alone]


def test_a_cancelled_request_frees_its_row_and_says_nothing_more(tiny: CoSupModel, index: FaissIndex) -> None:
    session = Engine(tiny, index, Options(rows=1, max_new_tokens=20, mode="none")).session()
    first, second, third = (session.submit(prompt) for prompt in ("gold?", "iron?", "Oslo?"))
    assert {request for request, _ in session.step()} <= {first}
    session.cancel(first)
    session.cancel(third)
    assert (session.active, session.waiting) == (0, 1)
    assert {request for request, _ in drain(session)} == {second}
    session.cancel(second)  # has ended
    session.cancel(99)


def test_rows_that_stay_behind_a_cancelled_one_are_not_disturbed(tiny: CoSupModel, index: FaissIndex) -> None:
    options = Options(rows=3, max_new_tokens=12, retrieve_first=True)
    prompts = ["gold?", "iron and iron?", "Oslo? Oslo? Oslo?"]
    alone = [Engine(tiny, index, options).generate([prompt])[0] for prompt in prompts]
    session = Engine(tiny, index, options).session()
    requests = [session.submit(prompt) for prompt in prompts]
    for _ in range(4):
        session.step()
    session.cancel(requests[0])
    rest = responses(session)
    assert [essence(rest[request]) for request in requests[1:]] == [essence(response) for response in alone[1:]]


def test_what_rows_have_read_of_the_same_beginning_is_not_read_again(
    tiny: CoSupModel, index: FaissIndex, read: list[list[Chunk]]
) -> None:
    session = Engine(tiny, index, Options(rows=2, max_new_tokens=4, mode="none")).session()
    prompts = [tiny.template.prompt(question, task="") for question in ("Which city, Oslo?", "Which city, Paris?")]
    common = next(i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b)
    session.submit(prompts[0])
    session.step()
    session.submit(prompts[1])
    second = responses(session)[1]
    joined = next(chunk for step in read[1:] for chunk in step if chunk.slot == 1)
    assert joined.start == common > 10
    assert joined.ids == prompts[1][common:]
    again = Engine(tiny, index, Options(rows=2, max_new_tokens=4, mode="none")).generate([prompts[1]])[0]
    assert essence(second) == essence(again)


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(
    tiny: CoSupModel, index: FaissIndex, read: list[list[Chunk]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cosup.engine.session.TOKENS_PER_STEP", 50)
    session = Engine(tiny, index, Options(rows=2, max_new_tokens=10, mode="none", guesses=0)).session()
    session.submit("gold?")
    session.step()
    prompt = tiny.template.encode("gold and iron and krone " * 20)[:130]
    session.submit(prompt)
    written = sum(request == 0 for _ in range(2) for request, _ in session.step())
    assert written == 2
    assert [[len(chunk.ids) for chunk in step] for step in read[1:3]] == [[1, 50], [1, 50]]
    alone = Engine(tiny, index, Options(rows=1, max_new_tokens=10, mode="none")).generate([prompt])[0]
    assert essence(responses(session)[1]) == essence(alone)


class Failing(FaissIndex):
    """Has no passage p-gone, and can't search for what `where` calls broken."""

    def search(self, queries_QD: Any, k: int, *, where: Any = None) -> list[list[Hit]]:
        if where == {"source": "broken"}:
            raise OSError("the disk is gone")
        if where == {"source": "lost"}:
            return [[Hit("p-gone", 1.0)] for _ in queries_QD]
        return super().search(queries_QD, k, where=where)


def test_an_error_of_the_index_ends_that_request_alone(tiny: CoSupModel, index: FaissIndex) -> None:
    failing = Failing(index.folder)
    options = [
        Options(retrieve_first=True, max_new_tokens=6, where={"source": s}) for s in ("a", "broken", "lost", "b")
    ]
    good, broken, lost, other = Engine(tiny, failing).generate(["gold?"] * 4, options=options)
    assert (broken.reason, broken.error) == ("error", "the search of the index failed (OSError): the disk is gone")
    assert lost.reason == "error"
    assert lost.error == "a passage that was found could not be read (KeyError): 'p-gone'"
    assert not broken.well_formed
    for response, numbers in ((good, range(6)), (other, range(6, 12))):
        assert response.reason in ("stop", "length")
        assert response.claims[0].passage in {f"p{i}" for i in numbers}


def test_rows_that_ask_in_the_same_step_are_searched_together(
    tiny: CoSupModel, index: FaissIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    search = index.search

    def counting(queries_QD: Any, k: int, *, where: Any = None) -> list[list[Hit]]:
        counts.append(len(queries_QD))
        return search(queries_QD, k, where=where)

    monkeypatch.setattr(index, "search", counting)
    plain = Options(retrieve_first=True, max_retrievals=1, max_new_tokens=3)
    options = [plain, replace(plain, temperature=1.0), plain, replace(plain, where={"source": "a"})]
    Engine(tiny, index, Options(rows=4)).generate(["gold?", "iron?", "Oslo?", "Seine?"], options=options)
    assert counts == [3, 1]


class FailingOnce(FaissIndex):
    """Can't search for several queries at once, nor for the second of them."""

    calls = 0

    def search(self, queries_QD: Any, k: int, *, where: Any = None) -> list[list[Hit]]:
        self.calls += 1
        if len(queries_QD) > 1 or self.calls == 3:
            raise ValueError("no")
        return super().search(queries_QD, k, where=where)


def test_a_query_that_breaks_a_common_search_fails_alone(tiny: CoSupModel, index: FaissIndex) -> None:
    options = Options(retrieve_first=True, max_retrievals=1, max_new_tokens=3)
    found = Engine(tiny, FailingOnce(index.folder), options).generate(["gold?", "iron?", "Oslo?"])
    assert [response.reason == "error" for response in found] == [False, True, False]


def test_the_passages_that_are_found_can_be_restricted(tiny: CoSupModel, index: FaissIndex) -> None:
    options = Options(retrieve_first=True, max_new_tokens=3, where={"source": "b"})
    (response,) = Engine(tiny, index, options).generate(["gold?"])
    assert {int(id[1:]) // 6 for ids in response.retrieved for id in ids} == {1}
    nowhere = Options(retrieve_first=True, max_new_tokens=3, where={"source": "nowhere"})
    (response,) = Engine(tiny, index, nowhere).generate(["gold?"])
    assert response.nothing_found
    assert response.retrieved[0] == ()


def test_guesses_change_how_often_gen_is_run_and_not_what_it_writes(
    tiny: CoSupModel, index: FaissIndex, read: list[list[Chunk]]
) -> None:
    prompts = ["gold " * 20, "Which city is the capital of Norway? Which city is the capital of"]
    written, steps = [], []
    for guesses in (0, 7):
        read.clear()
        options = Options(max_new_tokens=40, mode="none", rows=1, guesses=guesses)
        written.append([essence(response)[:-1] for response in Engine(tiny, index, options).generate(prompts)])
        steps.append(len(read))
    assert written[0] == written[1]
    assert steps[1] < steps[0]


def test_an_empty_prompt_and_one_that_is_too_long_are_refused_at_once(tiny: CoSupModel, index: FaissIndex) -> None:
    session = Engine(tiny, index).session()
    with pytest.raises(UserError, match="the prompt is empty"):
        session.submit([])
    with pytest.raises(UserError, match=r"the prompt has .* tokens, and the model reads at most 512"):
        session.submit("gold " * 600)
    assert session.waiting == 0


def test_the_time_is_accounted_for(tiny: CoSupModel, index: FaissIndex) -> None:
    session = Engine(tiny, index, Options(retrieve_first=True, max_new_tokens=5)).session()
    session.submit("gold?")
    assert any(isinstance(event, Token) for _, event in list(drain(session)))
    spent = session.seconds
    parts = (spent.reading, spent.writing, spent.searching, spent.sampling)
    assert min(parts) > 0
    assert sum(parts) <= spent.total
