"""What a server accepts, and how long it waits."""

from dataclasses import dataclass, fields

from cosup.config import UserError


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server accepts, and how long it waits.

    Args:
        queue: chats that may wait while all rows are in use; one more is answered 429. As many other requests as chats
            may be under way at once.
        body_bytes: largest body of a request.
        prompt_chars: most characters of all messages of a chat, or of a query.
        new_tokens: most tokens that a request may ask for.
        inputs: most texts in one request for embeddings, and most passages in one addition.
        passage_chars: most characters of a passage or of a text to embed.
        request_seconds: time from a request's arrival to its last token, or to the answer of one that is no chat.
        drain_seconds: time that running requests have to finish after the signal to stop.

    Raises:
        UserError: a value that is not positive; `queue` may be 0.
    """

    queue: int = 64
    body_bytes: int = 1 << 20
    prompt_chars: int = 50_000
    new_tokens: int = 1024
    inputs: int = 256
    passage_chars: int = 50_000
    request_seconds: float = 300.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name != "queue"):
                raise UserError(f"{field.name} must be above 0, not {value}")
