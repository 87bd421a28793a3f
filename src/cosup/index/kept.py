"""BM25 of an index, kept between processes: making it takes seconds, reading it back a tenth of one."""

import hashlib
import json
import logging
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cosup.config import UserError
from cosup.files import atomic_folder, cache_folder, sha256
from cosup.index.bm25 import BM25
from cosup.index.folder import FaissIndex
from cosup.index.manifest import MANIFEST
from cosup.index.protocol import Index

log = logging.getLogger(__name__)

WORTH_KEEPING = 5_000  # passages; fewer take less than a second
_KEPT = "kept.json"


def bm25_of(index: Index) -> BM25:
    """BM25 over all passages of an index.

    That of a large folder is kept in the user's cache folder, for its last state alone. What is not of this state, or
    damaged, is made anew; where nothing can be written, nothing is kept.
    """
    if not isinstance(index, FaissIndex) or len(index) < WORTH_KEEPING:
        return BM25(list(index))
    state = _state(index)
    with suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):  # the last: there is no home folder
        return _read(_place(index.folder), state)
    log.info("BM25 of %s passages is made, and kept for the next search", f"{len(index):,}")
    made = BM25(list(index))
    with suppress(UserError, OSError, ValueError, RuntimeError):
        _write(made, _place(index.folder), state)
        _forget_removed()
    return made


def generation_of(index: Index) -> int:
    """Which state of it an index folder is in, as far as it was read: one more with each change. Else 0."""
    return index.manifest.generation if isinstance(index, FaissIndex) else 0


def _place(folder: Path) -> Path:
    return cache_folder() / "bm25" / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def _state(index: FaissIndex) -> dict[str, Any]:
    """What BM25 depends on, as JSON has it."""
    manifest = index.manifest
    return {
        "folder": str(index.folder.resolve()),
        "bm25s": version("bm25s"),
        "passages": [segment.files["passages"].sha256 for segment in manifest.segments],
        "removed": manifest.removed and manifest.removed.sha256,
    }


def _read(place: Path, state: dict[str, Any]) -> BM25:
    kept = json.loads((place / _KEPT).read_text("utf-8"))
    if kept["state"] != state or any(sha256(place / name) != digest for name, digest in kept["files"].items()):
        raise ValueError("of another state, or damaged")
    found = BM25.load(place)
    if json.loads((place / _KEPT).read_text("utf-8")) != kept:
        raise ValueError("another process has put another in its place meanwhile")
    return found


def _write(bm25: BM25, place: Path, state: dict[str, Any]) -> None:
    with atomic_folder(place, marker=_KEPT) as new:
        bm25.save(new)
        files = {path.name: sha256(path) for path in sorted(new.iterdir())}
        (new / _KEPT).write_text(json.dumps({"state": state, "files": files}) + "\n", encoding="utf-8")


def _forget_removed() -> None:
    """Removes what is kept of folders that are no index any more."""
    for kept in (cache_folder() / "bm25").glob(f"*/{_KEPT}"):
        with suppress(ValueError, KeyError, TypeError):
            if not (Path(json.loads(kept.read_text("utf-8"))["state"]["folder"]) / MANIFEST).is_file():
                shutil.rmtree(kept.parent)
