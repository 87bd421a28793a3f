"""What every request passes before a route sees it, and every answer on its way out."""

import json
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cosup.serve.keys import Keys
from cosup.serve.keys import Scope as KeyScope
from cosup.serve.metrics import Metrics

log = logging.getLogger("cosup.serve")

OPEN = ("/", "/page.css", "/page.js", "/icon.svg", "/docs", "/docs.js", "/openapi.json", "/healthz", "/readyz")
"""Paths that need no key: they tell nothing of passages or prompts."""

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
_LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})


class TooLargeError(Exception):
    """A body went beyond its limit while it was read."""


class Refusal(Exception):  # noqa: N818 - an answer, not an accident
    """An answer in place of the route's.

    Args:
        status: of HTTP.
        message: for the client.
        code: for programs.
    """

    def __init__(self, status: int, message: str, code: str):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Guard:
    """Request ids, log lines, headers, keys, host, content type and size of the body.

    Args:
        app: what comes behind.
        metrics: counts the answers.
        keys: None: everyone who reaches the server may use it, under the name of this machine only.
        body_bytes: largest body.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, keys: Keys | None, body_bytes: int):
        self._app, self._metrics, self._keys, self._body_bytes = app, metrics, keys, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Exchange(scope, receive, send, self._body_bytes).run(self._app, self._check, self._metrics)

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._keys is None and _host(headers.get("host", "")) not in _LOCAL_HOSTS:
            raise Refusal(403, "without API keys the server answers to the name of this machine only", "host")
        if self._keys is not None and scope["path"] not in OPEN:
            _check_key(self._keys.scopes(_bearer(headers.get("authorization", ""))), scope)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._body_bytes:
            raise TooLargeError
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise Refusal(415, "the body must be JSON, with the content type application/json", "content_type")


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body_bytes: int):
        self._scope, self._receive, self._send = scope, receive, send
        self._left, self._status = body_bytes, 0
        self._id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self._id

    async def run(self, app: ASGIApp, check: Any, metrics: Metrics) -> None:
        started = time.perf_counter()
        try:
            check(self._scope)
            await app(self._scope, self._read, self._write)
        except Refusal as e:
            await self._refuse(e.status, e.message, e.code)
        except TooLargeError:
            await self._refuse(413, "the body is larger than this server takes", "body_too_large")
        except Exception as e:
            # its message and its traceback's last line may hold a prompt: where it happened is enough
            log.error("request %s failed: %s at %s", self._id, type(e).__name__, _where(e))
            await self._refuse(500, f"the server failed on request {self._id}", "server_error")
        finally:
            route = getattr(self._scope.get("route"), "path", "unmatched")
            method = self._scope["method"] if route != "unmatched" else "other"
            metrics.requests.labels(method, route, str(self._status or 499)).inc()
            log.info("%s %s %s %s %.3f s", self._id, method, route, self._status or 499, time.perf_counter() - started)

    async def _read(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise TooLargeError  # the framework makes a 400 of it, which `_write` turns back
        return message

    async def _write(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._left < 0 and message["status"] != 413:
                raise TooLargeError
            self._status = message["status"]
            own = {name for name, _ in message.get("headers", [])}
            added = [pair for pair in _HEADERS if pair[0] not in own]
            message["headers"] = [*message.get("headers", []), *added, (b"x-request-id", self._id.encode())]
        await self._send(message)

    async def _refuse(self, status: int, message: str, code: str) -> None:
        if self._status:  # the answer has begun; all that is left is to break it off
            return
        body = json.dumps(error_body(status, message, code)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if status == 413:
            headers.append((b"connection", b"close"))
        await self._write({"type": "http.response.start", "status": status, "headers": headers})
        await self._write({"type": "http.response.body", "body": body})


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """An error of the OpenAI form."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _check_key(scopes: frozenset[KeyScope], scope: Scope) -> None:
    if not scopes:
        raise Refusal(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")
    changes = scope["path"].startswith("/v1/passages") and scope["method"] not in ("GET", "HEAD", "OPTIONS")
    needed: KeyScope = "write" if changes else "read"
    if needed not in scopes:
        raise Refusal(403, f"this API key does not have the scope {needed}", "missing_scope")


def _bearer(header: str) -> str:
    kind, _, key = header.partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _host(header: str) -> str:
    return header if header.endswith("]") else header.rpartition(":")[0] or header


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    places: Sequence[str] = []
    while trace is not None:
        places = [*places, f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}"]
        trace = trace.tb_next
    return " > ".join(places[-3:]) or "?"
