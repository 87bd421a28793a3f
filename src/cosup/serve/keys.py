"""API keys: shown once when they are made, kept as hashes in a file."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cosup.config import UserError
from cosup.files import atomic_file

Scope = Literal["read", "write"]
Name = Annotated[str, Field(min_length=1, max_length=100)]


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Name
    scopes: list[Scope]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    created: str


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format_version: Literal[1] = 1
    keys: list[_Key] = []


class Keys:
    """The keys of a file. A key has 256 random bits, so that a plain SHA-256 can't be searched for it.

    Args:
        path: a file written by `add_key`.

    Raises:
        UserError: it is missing, damaged, or holds no key.
    """

    def __init__(self, path: Path):
        self._keys = _read(path).keys
        if not self._keys:
            raise UserError(f"{path} holds no key: add one with `cosup serve keys add`")

    def scopes(self, key: str) -> frozenset[Scope]:
        """What a key allows; nothing if it is unknown. Takes the same time whichever key it is."""
        digest = _digest(key)
        found: frozenset[Scope] = frozenset()
        for known in self._keys:
            if hmac.compare_digest(digest, known.sha256):
                found = frozenset(known.scopes)
        return found


def add_key(path: Path, name: str, *, scopes: Sequence[Scope]) -> str:
    """Makes a key, adds its hash to the file, readable by its owner only, and returns the key.

    Raises:
        UserError: the file is damaged, or has a key of this name, or no key can have such a name.
    """
    file = _read(path) if path.exists() else _File()
    if any(known.name == name for known in file.keys):
        raise UserError(f"{path} has a key named {name!r} already; choose another name")
    key = f"cosup-{secrets.token_urlsafe(32)}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        made = _Key(name=name, scopes=list(scopes), sha256=_digest(key), created=created)
    except ValidationError as e:
        raise UserError(f"no key can have the name {name!r:.80}: {e.errors()[0]['msg']}") from None
    _write(path, _File(keys=[*file.keys, made]))
    return key


def remove_key(path: Path, name: str) -> None:
    """Removes a key by its name; a running server knows it until it is started again.

    Raises:
        UserError: the file is missing or damaged, or has no such key.
    """
    file = _read(path)
    kept = [known for known in file.keys if known.name != name]
    if len(kept) == len(file.keys):
        raise UserError(f"{path} has no key named {name!r}")
    _write(path, _File(keys=kept))


def _write(path: Path, file: _File) -> None:
    with atomic_file(path) as out:
        out.write((file.model_dump_json(indent=2) + "\n").encode())
    path.chmod(0o600)


def _read(path: Path) -> _File:
    try:
        return _File.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no file of keys at {path}: make one with `cosup serve keys add`") from None
    except ValidationError:
        raise UserError(f"{path} is not a file of keys; make one with `cosup serve keys add`") from None
    except OSError as e:
        raise UserError(f"{path} can't be read: {e.strerror}") from None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
