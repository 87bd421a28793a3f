"""Binding, starting and stopping."""

import ipaddress
import logging
from pathlib import Path

import uvicorn

from cosup.config import UserError
from cosup.engine import Engine
from cosup.serve.app import create_app
from cosup.serve.keys import Keys
from cosup.serve.limits import Limits


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
    """Serves until SIGINT or SIGTERM, then finishes what runs.

    Raises:
        UserError: `host` can be reached from other machines, and there are no keys.
    """
    keys = check_address(host, keys_file)
    limits = limits or Limits()
    logging.getLogger("cosup.serve").setLevel(logging.INFO)
    uvicorn.run(
        create_app(engine, name=name, limits=limits, keys=keys, origins=origins),
        host=host,
        port=port,
        access_log=False,  # it would hold paths; the guard writes a line of its own
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(limits.drain_seconds) or 1,
    )


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


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
