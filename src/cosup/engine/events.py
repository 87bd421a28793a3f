"""What happens while a response is written, in order."""

from dataclasses import dataclass

from cosup.index import Hit
from cosup.template import Reason, Response


@dataclass(frozen=True, slots=True)
class Token:
    """A token was written, or inserted; `text` is what can be shown since the last one.

    Never half a character, and nothing that may still turn out to be the beginning of a stop string.
    """

    text: str
    id: int
    inserted: bool


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The index was searched with the state at `[Ret]`; best first.

    `found` is False where no passage was good enough or left: then the `[Ret]` was taken back, and no token of it is
    reported.
    """

    hits: tuple[Hit, ...]
    found: bool = True


@dataclass(frozen=True, slots=True)
class Inserted:
    """A passage is put into Gen's context; its tokens follow. `score` is that of its hit."""

    passage_id: str
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class ClaimOpened:
    """What follows rests on this passage."""

    passage_id: str


@dataclass(frozen=True, slots=True)
class ClaimClosed:
    """The claim is the characters from `start` to `end` of the response's text."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event."""

    reason: Reason
    response: Response


Event = Token | Retrieved | Inserted | ClaimOpened | ClaimClosed | Finished
