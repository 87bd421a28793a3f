"""`index.json`: which files make up an index, how they are checked, and how a change of it becomes visible.

A change writes new files, named by the next generation, and then replaces `index.json` in one rename: a reader sees
the state before or the state after, and nothing else.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cosup.config import UserError
from cosup.files import atomic_file, sha256

FORMAT_VERSION = 2
MANIFEST = "index.json"
_BLOCK = 1 << 16
_SAMPLED_BLOCKS = 16

Dtype = Literal["float32", "float16", "int8"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """A file of the index.

    Args:
        name: within the folder.
        bytes: its size.
        sha256: of all of it.
        crc32: of all of it; quick enough to be checked when the file is first read.
        sample: CRC-32 of sixteen evenly spread blocks of 64 KiB, the first and the last among them; a file of 1 MiB or
            less is covered whole. Checked whenever the index is opened.
    """

    name: str
    bytes: int
    sha256: str
    crc32: int
    sample: int


class SegmentEntry(_Strict):
    """Passages that were written together.

    Args:
        count: how many.
        files: by their roles; see `cosup.index.segment`.
        effort: how hard its FAISS structure looks: lists probed, or nodes kept in view; 0 without one.
        candidates: how many of those that the structure proposes are scored again at least.
        recall: recall@10 that was measured with these on a sample of its own vectors.
    """

    count: int
    files: dict[str, FileEntry]
    effort: int = 0
    candidates: int = 160
    recall: float = 1.0


class Manifest(_Strict):
    """What the folder holds and what made it.

    Args:
        format_version: of the folder.
        kind: as asked for: `flat`, `hnsw`, `ivf-pq`, or a FAISS factory string.
        metric: how vectors are compared.
        fingerprint: of the embedder.
        layout: what the embedder does with a passage, in words.
        dim: D, size of a vector.
        dtype: how vectors are stored.
        count: how many passages a search can find.
        generation: goes up by one with each change.
        segments: in the order of their rows.
        removed: which rows are no more.
        aliases: ids of duplicates and the id of the passage that stands for them.
    """

    format_version: int = FORMAT_VERSION
    kind: str
    metric: Literal["inner_product"] = "inner_product"
    fingerprint: str
    layout: dict[str, str]
    dim: int
    dtype: Dtype
    count: int
    generation: int
    segments: list[SegmentEntry]
    removed: FileEntry | None = None
    aliases: FileEntry | None = None

    def files(self) -> list[FileEntry]:
        """Every file that it names."""
        entries = [file for segment in self.segments for file in segment.files.values()]
        return [*entries, *(file for file in (self.removed, self.aliases) if file is not None)]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes a state current: the last step of every change."""
    raw = manifest.model_dump(mode="json")
    raw["checksum"] = _checksum(raw)
    with atomic_file(folder / MANIFEST) as file:
        file.write((json.dumps(raw, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """The current state of a folder.

    Raises:
        UserError: there is none, it is damaged, or its format is another version's.
    """
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            raise _other_version(path, version)
        if raw.pop("checksum") != _checksum(raw):
            raise ValueError("its checksum differs")
        return Manifest.model_validate(raw)
    except (FileNotFoundError, NotADirectoryError):
        unfinished = folder / "building"
        hint = "the build is not finished: run it again" if unfinished.is_dir() else "make one with `cosup index build`"
        raise UserError(f"there is no index at {folder}: {hint}") from None
    except OSError as e:
        raise UserError(f"{path} can't be read: {e.strerror}") from e
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} is damaged ({str(e).splitlines()[0]}); build the index again") from None


def _other_version(path: Path, version: int) -> UserError:
    if version > FORMAT_VERSION:
        return UserError(f"{path} has format version {version}, newer than this cosup reads; upgrade cosup")
    return UserError(f"{path} has format version {version}, which this cosup no longer reads; build the index again")


def _checksum(raw: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def describe(path: Path) -> FileEntry:
    """The entry of a file that is complete."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return FileEntry(name=path.name, bytes=path.stat().st_size, sha256=sha256(path), crc32=crc, sample=_sample(path))


def check_quickly(folder: Path, file: FileEntry) -> None:
    """Size and sampled blocks, whatever the file's size.

    Raises:
        UserError: the file is missing, truncated, or differs in a sampled block; it is named.
    """
    path = folder / file.name
    actual = path.stat().st_size if path.is_file() else None
    if actual != file.bytes:
        state = "missing" if actual is None else f"{actual:,} bytes long where the manifest says {file.bytes:,}"
        raise UserError(f"{path} is {state}; build the index again")
    if _sample(path) != file.sample:
        raise damaged(path)


def check_fully(folder: Path, file: FileEntry) -> None:
    """Every byte. Raises UserError as `check_quickly`."""
    check_quickly(folder, file)
    if sha256(folder / file.name) != file.sha256:
        raise damaged(folder / file.name)


def damaged(path: Path) -> UserError:
    """The error of a file whose bytes are not those that were written."""
    return UserError(f"{path} is damaged: its checksum differs from the manifest's; build the index again")


def _sample(path: Path) -> int:
    size, crc = path.stat().st_size, 0
    last = max(size - _BLOCK, 0)
    starts = {last * i // (_SAMPLED_BLOCKS - 1) for i in range(_SAMPLED_BLOCKS)}
    with path.open("rb", buffering=0) as file:
        for start in sorted(starts):
            file.seek(start)
            crc = zlib.crc32(file.read(_BLOCK), crc)
    return crc
