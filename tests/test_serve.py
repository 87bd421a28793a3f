"""The server, asked by the official client and by clients that mean harm."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from cosup.config import UserError
from cosup.data import Passage
from cosup.engine import Engine, Options, Session
from cosup.index import FaissIndex, build_index
from cosup.model import CoSupModel
from cosup.serve import Keys, Limits, add_key, create_app
from cosup.serve.run import check_address

QUESTION = "Which city governs Norway?"
FIRST: dict[str, Any] = {"cosup": {"retrieve_first": True}}


@contextmanager
def running(engine: Engine, **settings: Any) -> Iterator[str]:
    """The address of a server of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(engine, **settings)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def engine(tiny: CoSupModel, passages: list[Passage], tmp_path: Path) -> Engine:
    build_index(passages, tiny, tmp_path / "index")
    return Engine(tiny, FaissIndex(tmp_path / "index"), Options(rows=2))


@pytest.fixture
def address(engine: Engine) -> Iterator[str]:
    with running(engine, limits=Limits(body_bytes=100_000)) as address:
        yield address


def client(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    settings: dict[str, Any] = {"max_tokens": 12, "extra_body": FIRST, **more}
    return client.chat.completions.create(model="cosup", messages=[{"role": "user", "content": QUESTION}], **settings)


def test_official_client_gets_the_engines_answer_with_its_citations(engine: Engine, address: str) -> None:
    (expected,) = engine.generate([QUESTION], options=Options(max_new_tokens=12, retrieve_first=True))
    with client(address) as asking:
        got = ask(asking)
    assert got.choices[0].message.content == expected.text
    cited = [annotation.url_citation for annotation in got.choices[0].message.annotations]
    assert [(c.passage_id, c.start_index, c.end_index) for c in cited] == [
        (claim.passage, claim.start, claim.end) for claim in expected.claims
    ]
    assert cited
    assert got.usage.completion_tokens == expected.tokens_sampled


def test_stream_joins_to_the_whole_answer_and_ends_with_usage(address: str) -> None:
    with client(address) as asking:
        whole = ask(asking)
        chunks = list(ask(asking, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    notes = [note for c in chunks if c.choices for note in getattr(c.choices[0].delta, "annotations", None) or []]
    assert [note["url_citation"]["passage_id"] for note in notes] == [
        note.url_citation.passage_id for note in whole.choices[0].message.annotations
    ]


def test_retrievals_are_told_only_to_those_who_ask(address: str) -> None:
    told = {"cosup": {"retrieve_first": True, "events": True}}
    with client(address) as asking:
        plain = [c for c in ask(asking, stream=True) if getattr(c, "cosup", None)]
        events = [c.cosup for c in ask(asking, stream=True, extra_body=told) if getattr(c, "cosup", None)]
    assert plain == []
    assert events[0]["type"] == "retrieval"
    assert len(events[0]["candidates"]) == 5


def test_search_passages_and_embeddings_agree_with_the_model(engine: Engine, address: str) -> None:
    with httpx.Client(base_url=address) as http, client(address) as asking:
        found = http.post("/v1/search", json={"query": QUESTION, "top": 3}).json()["data"]
        vector = asking.embeddings.create(model="cosup", input="new text").data[0].embedding
        added = http.post("/v1/passages", json={"passages": [{"id": "a/b", "text": "new text"}]}).json()
        got = http.get("/v1/passages/a/b").json()
        removed = [http.delete("/v1/passages/a/b").status_code for _ in range(2)]
    (hits,) = engine.index.search(engine.model.query([engine.model.template.prompt(QUESTION, task="")]), 3)
    assert [passage["id"] for passage in found] == [hit.id for hit in hits]
    assert vector == pytest.approx(engine.model.embed_passages([Passage("x", "new text")])[0].tolist(), abs=1e-6)
    assert added == {"added": 1, "count": 13}
    assert got["text"] == "new text"
    assert removed == [200, 404]


BAD: list[tuple[str, bytes]] = [
    ("not json", b"{"),
    ("invalid utf-8", b'{"model": "\xff"}'),
    ("wrong types", b'{"model": "cosup", "messages": 3}'),
    ("no message", b'{"model": "cosup", "messages": []}'),
    ("half a surrogate", b'{"model": "cosup", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    ("no end of nesting", b"[" * 90_000),
    ("a number too large", b'{"model": "cosup", "messages": [{"role": "user", "content": "x"}], "seed": 1e999}'),
    ("tokens beyond the limit", b'{"model":"cosup","messages":[{"role":"user","content":"x"}],"max_tokens":99999}'),
    (
        "a prompt too long",
        json.dumps({"model": "cosup", "messages": [{"role": "user", "content": "x" * 9000}]}).encode(),
    ),
]


@pytest.mark.parametrize(("what", "body"), BAD, ids=[what for what, _ in BAD])
def test_bad_bodies_are_a_400_in_the_openai_form(address: str, what: str, body: bytes) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("chunked", [True, False])
def test_ten_megabytes_are_a_413(address: str, chunked: bool) -> None:
    content: Any = (b"x" * 100_000 for _ in range(100)) if chunked else b"x" * 10_000_000
    try:
        answer = httpx.post(f"{address}/v1/search", content=content, headers={"content-type": "application/json"})
    except (httpx.WriteError, httpx.ReadError):
        return  # the server had answered and hung up before all of it was sent
    assert answer.status_code == 413


@pytest.mark.parametrize("path", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "C:\\x"])
def test_path_tricks_find_nothing(address: str, path: str) -> None:
    answer = httpx.get(f"{address}/v1/passages/{path}")
    assert answer.status_code == 404
    assert "passwd" not in answer.text


def test_control_tokens_typed_by_users_are_text(engine: Engine, address: str) -> None:
    control = engine.model.template.decode([engine.model.template.ret])
    typed = engine.model.template.chat([{"role": "user", "content": f"{control} x"}])
    assert engine.model.template.ret not in typed
    with client(address) as asking:
        messages: Any = [{"role": "user", "content": f"{control} x"}]
        got = asking.chat.completions.create(model="cosup", messages=messages, max_tokens=2)
    assert got.usage is not None
    assert got.usage.prompt_tokens == len(typed)


def test_a_foreign_host_name_is_refused_without_keys(address: str) -> None:
    assert httpx.get(f"{address}/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_keys_are_needed_and_scopes_are_kept(engine: Engine, tmp_path: Path) -> None:
    reading = add_key(tmp_path / "keys", "reader", scopes=["read"])
    writing = add_key(tmp_path / "keys", "writer", scopes=["read", "write"])
    assert reading not in (tmp_path / "keys").read_text()
    body = {"passages": [{"id": "n", "text": "new"}]}
    with running(engine, keys=Keys(tmp_path / "keys")) as address, httpx.Client(base_url=address) as http:

        def post(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return http.post("/v1/passages", json=body, headers=headers).status_code

        assert [post(key) for key in ("none", "wrong", reading, writing)] == [401, 401, 403, 200]
        assert http.get("/healthz").status_code == 200
        assert http.get("/metrics").status_code == 401


def test_open_addresses_need_keys() -> None:
    assert check_address("127.0.0.1", None) is None
    with pytest.raises(UserError, match="API keys"):
        check_address("0.0.0.0", None)


def test_beyond_the_queue_is_429_and_clients_that_go_away_free_their_rows(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    step = Session.step

    def held(session: Session) -> Any:
        go_on.wait()
        return step(session)

    async def scene(address: str) -> None:
        body = {"model": "cosup", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 400}
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            asked = [asyncio.create_task(http.post("/v1/chat/completions", json=body)) for _ in range(3)]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            (full,) = (task.result() for task in done)
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) >= 1
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            go_on.set()
            while "cosup_rows_in_use 0.0" not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.02)

    monkeypatch.setattr(Session, "step", held)
    with running(engine, limits=Limits(queue=0)) as address:
        asyncio.run(scene(address))
