"""Files and folders that are either whole or absent, never half-written."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cosup.config import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file beside `path` for writing bytes and renames it to `path` when the block ends without an error.

    Raises:
        UserError: the disk is full, or the place may not be written to; nothing is left behind.
    """
    with explained(path):
        if path.is_dir():  # told before what is to be written was computed
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with explained(path):
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, marker: str) -> Iterator[Path]:
    """Gives an empty folder beside `path` and renames it to `path` when the block ends without an error.

    Args:
        path: an earlier folder of the same kind that is there is replaced.
        marker: the file by which that kind is known; a folder that holds other things is never replaced.

    Raises:
        UserError: `path` holds something else, or as `atomic_file`.
    """
    if path.exists() and not (path / marker).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and has no {marker}, so it is not ours to replace; name another folder")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with explained(path):
            yield temporary
            _share(temporary)
            _replace_folder(temporary, path)
    except UserError as e:  # of a file inside, whose name nobody else knows
        raise UserError(str(e).replace(str(temporary), str(path))) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_overwriting(out: Path, inputs: Iterable[Path]) -> None:
    """Raises UserError if what is to be written would replace a file that it is made of."""
    for path in inputs:
        if path.is_file() and out.exists() and path.samefile(out):
            raise UserError(f"{out} is read, and would be replaced by what is made of it; name another file to write")


def cache_folder() -> Path:
    """Where what can be made again is kept for the user, between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosup"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _share(folder: Path) -> None:
    """Gives a folder and all in it the modes of any new one: what makes temporary files keeps them to their owner."""
    mask = _umask()
    for place in (folder, *folder.rglob("*")):
        if not place.is_symlink():
            place.chmod((0o777 if place.is_dir() else 0o666) & ~mask)


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    path.rename(old / path.name)
    try:
        new.rename(path)
    except OSError:
        (old / path.name).rename(path)
        raise
    shutil.rmtree(old)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write at `path` into a UserError."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path) from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise UserError(f"{path} can't be written: {e.strerror}") from e
        _recognise_full_disk(path, e)
        raise
    except Exception as e:
        _recognise_full_disk(path, e)
        raise


def _recognise_full_disk(path: Path, error: Exception) -> None:
    if os.strerror(errno.ENOSPC) in str(error):  # safetensors, torch and shutil wrap the system's error in their own
        raise _disk_full(path) from error


def _disk_full(path: Path) -> UserError:
    return UserError(f"the disk is full: {path} was not written; free some space and run this again")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
