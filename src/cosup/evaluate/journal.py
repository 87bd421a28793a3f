"""JSON Lines that grow while something long goes on, and that a kill may cut short."""

import json
from pathlib import Path
from typing import Any

from cosup.config import UserError
from cosup.files import atomic_file


def read_journal(path: Path, *, consequence: str) -> list[dict[str, Any]]:
    """The records of a file that is appended to; a last line that a kill cut short is taken away from it.

    Args:
        path: a file that need not exist.
        consequence: what happens again when the file is removed, for the message.

    Raises:
        UserError: a whole line is not a JSON object.
    """
    if not path.is_file():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        with atomic_file(path) as file:
            file.write(whole)
    try:
        return [dict(json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; remove it, so that {consequence}") from None
