"""The routes."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import wraps
from importlib import resources
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from cosup.config import UserError
from cosup.data import Passage
from cosup.engine import Engine, Options, Token, check_query
from cosup.index.protocol import PassageTooLargeError, Vectors
from cosup.serve import wire
from cosup.serve.answers import Answer
from cosup.serve.guard import Guard, Refusal, error_body
from cosup.serve.keys import Keys
from cosup.serve.limits import Limits
from cosup.serve.metrics import Metrics
from cosup.serve.worker import BusyError, FailedError, Found, Running, StoppedError, Worker

T = TypeVar("T")
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": wire.ErrorAnswer, "description": text}
    for status, text in {
        400: "The request is not understood.",
        401: "The API key is missing or unknown.",
        403: "The API key does not allow this.",
        404: "There is no such thing.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        429: "The queue is full; Retry-After says when to come back.",
        500: "The server failed.",
        503: "The server is shutting down, or its index can't be used.",
        504: "The request took too long.",
    }.items()
}
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page.js": ("page.js", "text/javascript"),
    "/docs": ("docs.html", "text/html"),
    "/docs.js": ("docs.js", "text/javascript"),
}


def create_app(
    engine: Engine,
    *,
    name: str = "cosup",
    limits: Limits | None = None,
    keys: Keys | None = None,
    origins: tuple[str, ...] = (),
    worker: Worker | None = None,
) -> ASGIApp:
    """The whole server as an ASGI application; its lifespan starts and ends the engine's thread.

    Args:
        engine: its `rows` requests run at once; its options hold for what the `cosup` object of a request leaves out.
        name: of the model, as clients see it.
        limits: see `Limits`.
        keys: None: no key is asked for, and only requests to this machine's own name are answered.
        origins: other sites whose pages may ask this server (CORS).
        worker: that runs the engine, for a caller who lets it drain; without it, one of the application's own.
    """
    limits = limits or Limits()
    server = _Server(engine, name, limits, worker or Worker(engine, queue_size=limits.queue))
    app = FastAPI(
        title="cosup", version="1", docs_url=None, redoc_url=None, lifespan=server.lifespan, redirect_slashes=False
    )
    app.include_router(server.router())
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]
    for error, handler in _HANDLERS.items():
        app.add_exception_handler(error, handler)
    guarded = Guard(app, metrics=server.metrics, keys=keys, body_bytes=limits.body_bytes)
    if not origins:
        return guarded
    return CORSMiddleware(
        guarded, allow_origins=origins, allow_methods=["*"], allow_headers=["authorization", "content-type"]
    )


class _Server:
    def __init__(self, engine: Engine, name: str, limits: Limits, worker: Worker):
        self.engine, self.name, self.limits, self.worker = engine, name, limits, worker
        self.metrics = Metrics(self.worker)
        self.created = int(time.time())
        self._others = 0  # requests under way that are no chats

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.stop)

    def router(self) -> APIRouter:
        router = APIRouter(responses=_ERRORS)
        api = APIRouter(dependencies=[Depends(self.taking)])
        add, limited = api.add_api_route, self._limited
        add("/v1/chat/completions", self.chat, methods=["POST"], response_model=wire.Completion)
        add("/v1/embeddings", limited(self.embeddings), methods=["POST"], response_model=wire.Embeddings)
        add("/v1/models", self.models, methods=["GET"], response_model=wire.Models)
        add("/v1/models/{model}", self.model, methods=["GET"], response_model=wire.ModelCard)
        add("/v1/search", limited(self.search), methods=["POST"], response_model=wire.SearchResult)
        add("/v1/passages", limited(self.add_passages), methods=["POST"], response_model=wire.Added)
        add("/v1/passages/{id:path}", limited(self.passage), methods=["GET"], response_model=wire.PassageForm)
        add(
            "/v1/passages/{id:path}",
            limited(self.remove_passage),
            methods=["DELETE"],
            response_model=wire.Removed,
        )
        router.include_router(api)
        add = router.add_api_route
        add("/healthz", self.health, methods=["GET"], response_class=PlainTextResponse)
        add("/readyz", self.ready, methods=["GET"], response_class=PlainTextResponse)
        add("/metrics", self.prometheus, methods=["GET"], response_class=PlainTextResponse)
        for path, (file, kind) in _PAGE.items():
            add(path, _file(file, kind), methods=["GET"], include_in_schema=False)
        return router

    async def taking(self) -> None:
        """Refuses what comes while the server drains."""
        self.worker.check_ready()

    def _limited(self, handler: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        """A handler of what is no chat: as many at once as chats may be, each for as long as a chat may take."""

        @wraps(handler)
        async def limited(*arguments: Any, **named: Any) -> T:
            if self._others >= self.worker.capacity:
                raise BusyError(1)
            self._others += 1
            try:
                async with asyncio.timeout(self.limits.request_seconds):
                    return await handler(*arguments, **named)
            finally:
                self._others -= 1

        return limited

    async def chat(self, request: Request, body: wire.ChatRequest) -> Any:
        """Answers a chat, with citations as annotations; as server-sent events if `stream` is true."""
        self._check_model(body.model)
        arrived = time.perf_counter()
        options = self._options(body)
        prompt = self._prompt(body)
        running = await self.worker.submit(prompt, options)
        answer = Answer(self.name, prompt_tokens=len(prompt), events=body.cosup.events)
        self.metrics.tokens.labels("prompt").inc(len(prompt))
        chunks = self._chunks(answer, running, arrived)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return _Stream(_sse(chunks, answer, usage), running)
        try:
            await _unless_gone(request, _exhaust(chunks))
        finally:
            running.close()
        return JSONResponse(answer.whole().model_dump(exclude_none=False))

    async def _chunks(self, answer: Answer, running: Running, arrived: float) -> AsyncIterator[list[dict[str, Any]]]:
        last: float | None = None
        async with asyncio.timeout(self.limits.request_seconds), aclosing(running.steps()) as items:
            async for each in items:
                self.metrics.retrievals.inc(sum(isinstance(item, Found) for item in each))
                if any(isinstance(item, Token) and item.text for item in each):
                    now = time.perf_counter()
                    timer = self.metrics.first_token if last is None else self.metrics.token
                    timer.observe(now - (arrived if last is None else last))
                    last = now
                yield list(answer.take(each))
        if answer.response is not None:
            self.metrics.tokens.labels("written").inc(answer.response.tokens_sampled)

    async def embeddings(self, body: wire.EmbeddingRequest) -> Any:
        """Embeds texts as passages without a title, by Emb_seq."""
        self._check_model(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        self._check_count(len(texts), "input")
        self._check_lengths(texts, self.limits.passage_chars)
        passages = [Passage(f"input {i}", text) for i, text in enumerate(texts)]
        vectors_PD = await self._embed(passages)
        read = sum(len(self.engine.model.template.encode(text)) for text in texts)
        data = [
            wire.Embedding(index=i, embedding=_encoded(row, body.encoding_format)) for i, row in enumerate(vectors_PD)
        ]
        usage = wire.EmbeddingUsage(prompt_tokens=read, total_tokens=read)
        return JSONResponse(wire.Embeddings(data=data, model=self.name, usage=usage).model_dump())

    async def models(self) -> wire.Models:
        """The one model."""
        return wire.Models(data=[self._card()])

    async def model(self, model: str) -> wire.ModelCard:
        """A model by its name."""
        self._check_model(model)
        return self._card()

    async def search(self, body: wire.SearchRequest) -> wire.SearchResult:
        """The passages that a retrieval right after the question finds, best first."""
        self._check_lengths([body.query], self.limits.prompt_chars)
        model, index = self.engine.model, self.engine.index
        prompt = model.template.prompt(body.query, task=body.task)
        weight = (self.engine.options.hybrid or 0.0) if body.hybrid is None else body.hybrid
        check_query(model, prompt)

        def run() -> list[wire.FoundPassage]:
            (hits,) = index.search(model.query([prompt]), body.top, words=[body.query], weight=weight)
            found = index.get([hit.id for hit in hits])
            return [
                wire.FoundPassage.model_construct(id=p.id, text=p.text, title=p.title, meta=p.meta, score=hit.score)
                for p, hit in zip(found, hits, strict=True)
            ]

        return wire.SearchResult.model_construct(data=await self._index(run))

    async def add_passages(self, body: wire.AddRequest) -> wire.Added:
        """Adds passages, all or none; one whose id is there is replaced. Needs the scope write."""
        self._check_count(len(body.passages), "passages")
        self._check_lengths([p.title + p.text for p in body.passages], self.limits.passage_chars)
        passages = [Passage(p.id, p.text, p.title, p.meta) for p in body.passages]
        vectors_PD = await self._embed(passages)

        def run() -> int:
            self.engine.index.add(passages, vectors_PD)
            return len(self.engine.index)

        return wire.Added(added=len({p.id for p in passages}), count=await self._index(run))

    async def passage(self, id: str) -> wire.PassageForm:
        """A passage by its id."""
        found = await self._index(lambda: self.worker.passage(id))
        if found is None:
            raise Refusal(404, "there is no passage with this id", "passage_not_found")
        return wire.PassageForm.model_construct(id=found.id, text=found.text, title=found.title, meta=found.meta)

    async def remove_passage(self, id: str) -> wire.Removed:
        """Removes a passage. Needs the scope write."""
        if not await self._index(lambda: self.engine.index.remove([id])):
            raise Refusal(404, "there is no passage with this id", "passage_not_found")
        return wire.Removed(id=id)

    async def health(self) -> str:
        """Whether the process answers."""
        return "ok\n"

    async def ready(self) -> str:
        """Whether it takes requests."""
        self.worker.check_ready()
        return "ready\n"

    async def prometheus(self) -> Response:
        """Figures for Prometheus."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _index(self, function: Callable[[], T]) -> T:
        """Its errors name folders and addresses of the server, and are none of the client's."""
        try:
            return await self.worker.call(function)
        except PassageTooLargeError:
            raise
        except UserError:
            told = "the index can't be used: another process writes it, or it can't be reached"
            raise Refusal(503, told, "index_unavailable") from None

    async def _embed(self, passages: list[Passage]) -> Vectors:
        """In small pieces, between which the answers go on."""
        pieces = [passages[i : i + 4] for i in range(0, len(passages), 4)]
        embed = self.engine.model.embed_passages
        rows = [row for piece in pieces for row in await self.worker.call(lambda piece=piece: embed(piece))]  # type: ignore[misc]
        return _stacked(rows)

    def _prompt(self, body: wire.ChatRequest) -> list[int]:
        self._check_lengths(["".join(message.text for message in body.messages)], self.limits.prompt_chars)
        if body.messages[-1].role != "user":
            raise UserError("a chat ends with a question: its last message must have the role user")
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in body.messages
        ]
        return self.engine.model.template.chat(messages, task=body.cosup.task)

    def _options(self, body: wire.ChatRequest) -> Options:
        tokens = body.max_completion_tokens or body.max_tokens or min(128, self.limits.new_tokens)
        if tokens > self.limits.new_tokens:
            raise UserError(f"max_tokens is {tokens:,}, and this server writes at most {self.limits.new_tokens:,}")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        extras = body.cosup.model_dump(exclude={"task", "events"}, exclude_unset=True)
        return replace(
            self.engine.options,
            max_new_tokens=tokens,
            temperature=0.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed or 0,
            stop=stop,
            **extras,
        )

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise Refusal(404, f"this server has one model, {self.name!r}; name that one", "model_not_found")

    def _check_count(self, count: int, what: str) -> None:
        if count > self.limits.inputs:
            raise UserError(f"{what} has {count:,} entries, and this server takes at most {self.limits.inputs:,}")

    def _check_lengths(self, texts: list[str], limit: int) -> None:
        longest = max(map(len, texts))
        if longest > limit:
            raise UserError(f"a text has {longest:,} characters, and this server takes at most {limit:,}")

    def _card(self) -> wire.ModelCard:
        return wire.ModelCard(id=self.name, created=self.created)


class _Stream(StreamingResponse):
    """A stream that closes its request however it ends, also before it began."""

    def __init__(self, content: AsyncIterator[str], running: Running):
        super().__init__(content, media_type="text/event-stream")
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.close()


async def _exhaust(chunks: AsyncIterator[Any]) -> None:
    async for _ in chunks:
        pass


async def _unless_gone(request: Request, work: Any) -> None:
    """Waits for the work, and ends it when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(499, "the client went away", "gone")
        task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _sse(chunks: Any, answer: Answer, usage: bool) -> AsyncIterator[str]:
    """Server-sent events; an error after the beginning is one of them."""
    try:
        async with aclosing(chunks):
            yield _data(answer.first())
            async for each in chunks:
                if each:
                    yield "".join(map(_data, each))
        if usage:
            yield _data(answer.usage_chunk())
    except (FailedError, UserError, TimeoutError) as e:
        yield _data(_as_error(e)[1])
    yield "data: [DONE]\n\n"


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _as_error(error: Exception) -> tuple[int, dict[str, Any]]:
    match error:
        case Refusal():
            return error.status, error_body(error.status, error.message, error.code)
        case UserError():
            return 400, error_body(400, str(error), "invalid_request")
        case BusyError():
            return 429, error_body(429, str(error), "queue_full")
        case StoppedError():
            return 503, error_body(503, "the server is shutting down", "shutting_down")
        case TimeoutError():
            return 504, error_body(504, "the request took longer than this server allows", "timeout")
    return 500, error_body(500, "the engine failed on this request", "engine_failed")


async def _answer_error(request: Request, error: Exception) -> Response:
    status, body = _as_error(error)
    headers: dict[str, str] = {}
    if isinstance(error, BusyError):
        headers = {"Retry-After": str(error.seconds)}
    elif isinstance(error, StoppedError):  # the next try is to reach another server
        headers = {"Retry-After": "1", "Connection": "close"}
    return JSONResponse(body, status, headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {404: "there is nothing at this address", 405: "this address does not take this method"}
    message = text.get(error.status_code, "the body is not valid JSON")
    return JSONResponse(
        error_body(error.status_code, message, "invalid_request"), error.status_code, dict(error.headers or {})
    )


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """Says where and what is wrong, not what was sent."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) if first["type"] != "json_invalid" else ""
    told = "the body is not valid JSON" if first["type"] == "json_invalid" else f"{place or 'body'}: {first['msg']}"
    return JSONResponse(error_body(400, told, "invalid_request", place or None), 400)


_HANDLERS: dict[type[Exception], Any] = {
    HTTPException: _answer_http,
    RequestValidationError: _answer_invalid,
    **dict.fromkeys((Refusal, UserError, BusyError, StoppedError, FailedError, TimeoutError), _answer_error),
}


def _description(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in app.openapi_schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # it is 400 here
        chat = app.openapi_schema["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
        chat["text/event-stream"] = {"schema": {"type": "string"}}
    return app.openapi_schema


def _file(name: str, kind: str) -> Callable[[], Any]:
    content = resources.files("cosup.serve").joinpath("page", name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=kind)

    return page


def _encoded(row: Any, encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    numbers: list[float] = row.tolist()
    return numbers


def _stacked(rows: list[Any]) -> Vectors:
    import numpy as np

    return np.stack(rows)
