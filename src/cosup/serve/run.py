"""Binding, starting and stopping."""

import ipaddress
import logging
import math
import socket
import time
from pathlib import Path
from types import FrameType

import uvicorn

from cosup.config import UserError
from cosup.engine import Engine
from cosup.serve.app import create_app
from cosup.serve.keys import Keys
from cosup.serve.limits import Limits
from cosup.serve.worker import Worker


def serve(
    engine: Engine,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "cosup",
    keys_file: Path | None = None,
    limits: Limits | None = None,
    origins: tuple[str, ...] = (),
) -> None:
    """Serves until SIGINT or SIGTERM, then finishes what runs; a second signal ends it at once.

    Raises:
        UserError: `host` can be reached from other machines, and there are no keys.
    """
    keys = check_address(host, keys_file)
    limits = limits or Limits()
    if engine.options.hybrid:
        _ = engine.index.bm25  # made now, so that no request waits for it
    logging.getLogger("cosup.serve").setLevel(logging.INFO)
    worker = Worker(engine, queue_size=limits.queue)
    app = create_app(engine, name=name, limits=limits, keys=keys, origins=origins, worker=worker)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,  # it would hold paths; the guard writes a line of its own
        log_level="warning",
        server_header=False,
    )
    DrainingServer(config, worker, seconds=limits.drain_seconds).run()


class DrainingServer(uvicorn.Server):
    """Listens on after the first signal until all is answered, so that a load balancer reads 503 at `/readyz`.

    Args:
        config: of uvicorn; `timeout_graceful_shutdown` is set from `seconds`.
        worker: takes no further request after the first signal.
        seconds: that running requests have to finish.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker, *, seconds: float):
        super().__init__(config)
        self._worker, self._seconds = worker, seconds
        self._end = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of a signal."""
        if not self._worker.ready:
            self.config.timeout_graceful_shutdown = 1
            super().handle_exit(sig, frame)
            return
        self._worker.refuse()
        self._end = time.monotonic() + self._seconds

    async def on_tick(self, counter: int) -> bool:
        """Every 0.1 s."""
        left = self._end - time.monotonic()
        if left < math.inf and (left <= 0 or not self._worker.open):
            # uvicorn waits for what is no chat, such as passages being added
            self.config.timeout_graceful_shutdown = max(math.ceil(left), 1)
            self.should_exit = True
        return await super().on_tick(counter)


def check_address(host: str, keys_file: Path | None) -> Keys | None:
    """The keys, or None where none are needed. Raises UserError where they are needed and absent."""
    if keys_file is not None:
        return Keys(keys_file)
    if not _is_loopback(host):
        raise UserError(
            f"{host} can be reached from other machines: name a file of API keys with --keys "
            "(make one with `cosup serve keys add`), or bind 127.0.0.1"
        )
    return None


def check_port(host: str, port: int) -> None:
    """Raises UserError where a server can't listen, before a model is loaded for it."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
            probe.bind(address)
    except OSError as e:
        raise UserError(
            f"no server can listen at {host}:{port} ({e.strerror or e}); name another --port or --host"
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
