import errno
import os
import shutil
from pathlib import Path

import pytest

from cosup.config import UserError
from cosup.files import atomic_file, atomic_folder, refuse_overwriting, sha256


def _tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write_file(path, content=b"new", error=None):
    with atomic_file(path) as file:
        file.write(content)
        if error:
            raise error


def _write_folder(path, content=b"new", error=None):
    with atomic_folder(path, marker="part") as folder:
        (folder / "part").write_bytes(content)
        if error:
            raise error


@pytest.fixture
def umask():
    def set_umask(value):
        before.append(os.umask(value))

    before = []
    yield set_umask
    os.umask(before[0])


BOTH = pytest.mark.parametrize("write", [_write_file, _write_folder])


# Whole or absent


def test_a_file_appears_with_its_content_and_the_folders_above_it(tmp_path):
    _write_file(tmp_path / "a" / "b" / "file")
    assert _tree(tmp_path) == {"a/b/file": b"new"}


def test_a_folder_appears_with_its_content_and_the_folders_above_it(tmp_path):
    _write_folder(tmp_path / "a" / "b" / "folder")
    assert _tree(tmp_path) == {"a/b/folder/part": b"new"}


@BOTH
def test_nothing_is_at_the_path_until_the_block_ends(tmp_path, write):
    path = tmp_path / "out"
    with atomic_file(path) if write is _write_file else atomic_folder(path, marker="part"):
        assert not path.exists()
    assert path.exists()


@BOTH
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_nothing_is_left_after_an_error_which_is_passed_on(tmp_path, write, error):
    with pytest.raises(type(error)):
        write(tmp_path / "out", error=error)
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays_after_an_error_and_is_replaced_without_one(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="x"):
        _write_file(path, error=ValueError("x"))
    assert _tree(tmp_path) == {"out": b"old"}
    _write_file(path)
    assert _tree(tmp_path) == {"out": b"new"}


def test_the_old_folder_stays_after_an_error_and_is_replaced_without_one(tmp_path):
    path = tmp_path / "out"
    _write_folder(path, b"old")
    (path / "other").write_bytes(b"old")
    with pytest.raises(ValueError, match="x"):
        _write_folder(path, error=ValueError("x"))
    assert _tree(tmp_path) == {"out/other": b"old", "out/part": b"old"}
    _write_folder(path)
    assert _tree(tmp_path) == {"out/part": b"new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


# Errors of the system


@BOTH
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_of_the_user_that_leaves_nothing(tmp_path, write, code):
    with pytest.raises(UserError, match=f"the disk is full: {tmp_path / 'out'} was not written"):
        write(tmp_path / "out", error=OSError(code, os.strerror(code)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_device_that_is_really_full_is_an_error_of_the_user(tmp_path, monkeypatch):
    def full(dir, prefix):
        name = str(tmp_path / "temporary")
        Path(name).symlink_to("/dev/full")
        return os.open(name, os.O_WRONLY), name

    monkeypatch.setattr("tempfile.mkstemp", full)
    with pytest.raises(UserError, match="the disk is full"):
        _write_file(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_path_below_a_file_can_not_be_written(tmp_path, write):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(UserError, match=f"{tmp_path / 'file' / 'out'} can't be written"):
        write(tmp_path / "file" / "out")
    assert _tree(tmp_path) == {"file": b"old"}


@BOTH
def test_a_place_that_may_not_be_written_to_is_an_error_of_the_user(tmp_path, write):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="can't be written: Permission denied"):
        write(tmp_path / "out")


@BOTH
def test_a_refused_write_inside_the_block_is_an_error_of_the_user(tmp_path, write):
    with pytest.raises(UserError, match=f"{tmp_path / 'out'} can't be written: Read-only"):
        write(tmp_path / "out", error=OSError(errno.EROFS, os.strerror(errno.EROFS)))


@BOTH
def test_an_error_that_no_user_can_mend_is_passed_on(tmp_path, write):
    with pytest.raises(OSError, match="Input/output") as caught:
        write(tmp_path / "out", error=OSError(errno.EIO, os.strerror(errno.EIO)))
    assert not isinstance(caught.value, UserError)


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_computed(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="can't be written: Is a directory"), atomic_file(tmp_path / "out"):
        raise AssertionError("the block began")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_full_disk_that_a_library_words_its_own_way_is_recognised(tmp_path):
    wrapped = shutil.Error([("a", "b", f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: 'a' -> 'b'")])
    with pytest.raises(UserError, match=f"the disk is full: {tmp_path / 'out'} was not written"):
        _write_folder(tmp_path / "out", error=wrapped)


def test_an_error_inside_a_folder_names_the_place_that_the_user_gave(tmp_path):
    with (
        pytest.raises(UserError, match=f"the disk is full: {tmp_path / 'out' / 'a.jsonl'} was not written"),
        atomic_folder(tmp_path / "out", marker="part") as new,
        atomic_file(new / "a.jsonl"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_what_would_replace_its_own_source_is_refused_under_any_name(tmp_path):
    source, other = tmp_path / "a.jsonl", tmp_path / "link.jsonl"
    source.write_bytes(b"precious")
    other.symlink_to(source)
    for out in (source, other, tmp_path / "." / "a.jsonl"):
        with pytest.raises(UserError, match="is read, and would be replaced"):
            refuse_overwriting(out, [tmp_path / "absent", source])
    refuse_overwriting(tmp_path / "new.jsonl", [source])


def test_a_file_in_the_place_of_a_folder_is_an_error_of_the_user_and_stays(tmp_path):
    (tmp_path / "out").write_bytes(b"precious")
    with pytest.raises(UserError, match="not ours to replace"):
        _write_folder(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_the_old_folder_stays_if_the_new_one_can_not_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "out"
    _write_folder(path, b"old")
    rename = Path.rename

    def fail(self, target):
        if target == path and self.parent == tmp_path and ".old." not in str(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        _write_folder(path)
    assert _tree(tmp_path) == {"out/part": b"old"}


# Permissions


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mask, file_mode, folder_mode):
    umask(mask)
    _write_file(tmp_path / "file")
    _write_folder(tmp_path / "folder")
    assert (tmp_path / "file").stat().st_mode & 0o777 == file_mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == folder_mode


def test_writing_leaves_the_umask_as_it_was(tmp_path, umask):
    umask(0o027)
    _write_file(tmp_path / "file")
    assert os.umask(0o027) == 0o027


# Digests


def test_the_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_that_holds_other_things_is_never_replaced(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with (
        pytest.raises(UserError, match="has no part, so it is not ours to replace"),
        atomic_folder(tmp_path / "notes", marker="part"),
    ):
        pass
    assert _tree(tmp_path) == {"notes/mine.txt": b"keep"}
