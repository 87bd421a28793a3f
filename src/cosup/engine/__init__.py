"""Retrieve-while-generating: Gen writes, its state at `[Ret]` searches the index, the passage is read, Gen goes on."""

from cosup.engine.engine import Engine, check_index, check_query
from cosup.engine.events import ClaimClosed, ClaimOpened, Event, Finished, Inserted, Retrieved, Token
from cosup.engine.options import Mode, Options
from cosup.engine.session import Seconds, Session

__all__ = [
    "ClaimClosed",
    "ClaimOpened",
    "Engine",
    "Event",
    "Finished",
    "Inserted",
    "Mode",
    "Options",
    "Retrieved",
    "Seconds",
    "Session",
    "Token",
    "check_index",
    "check_query",
]
