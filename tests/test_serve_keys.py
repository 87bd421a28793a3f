"""Files of API keys."""

from pathlib import Path

import pytest

from cosup.config import UserError
from cosup.serve.keys import Keys, add_key, remove_key


def test_a_key_has_its_scopes_and_any_other_has_none(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "a", scopes=["read"])
    keys = Keys(tmp_path / "keys")
    assert keys.scopes(key) == {"read"}
    assert keys.scopes(key[:-1]) == keys.scopes("") == frozenset()


def test_the_file_is_its_owners_and_holds_no_key(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "a", scopes=["read"])
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
    assert key not in (tmp_path / "keys").read_text()


def test_a_removed_key_is_unknown(tmp_path: Path) -> None:
    gone, left = (add_key(tmp_path / "keys", name, scopes=["read"]) for name in "ab")
    remove_key(tmp_path / "keys", "a")
    keys = Keys(tmp_path / "keys")
    assert not keys.scopes(gone)
    assert keys.scopes(left)


def test_a_name_is_used_once(tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "a", scopes=["read"])
    with pytest.raises(UserError, match="already"):
        add_key(tmp_path / "keys", "a", scopes=["read"])


@pytest.mark.parametrize("name", ["", "x" * 101, "\udcff"])
def test_a_name_that_no_key_can_have_is_told_and_leaves_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no key can have the name"):
        add_key(tmp_path / "keys", name, scopes=["read"])
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"keys": []}', b"\xff"])
def test_missing_damaged_and_empty_files_are_told(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(UserError, match="cosup serve keys add"):
        Keys(tmp_path / "keys")
