"""BM25 of an index, kept between processes: making it takes seconds, reading it back a tenth of one."""

import hashlib
import json
import logging
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cosup.config import UserError
from cosup.files import atomic_folder, cache_folder, sha256
from cosup.index.bm25 import BM25
from cosup.index.folder import FaissIndex
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
    place = cache_folder() / "bm25" / hashlib.sha256(str(index.folder.resolve()).encode()).hexdigest()[:16]
    state = _state(index)
    with suppress(OSError, ValueError, KeyError, TypeError):
        return _read(place, state)
    log.info("BM25 of %s passages is made, and kept for the next search", f"{len(index):,}")
    made = BM25(list(index))
    with suppress(UserError, OSError, ValueError):
        _write(made, place, state)
    return made


def _state(index: FaissIndex) -> dict[str, Any]:
    """What BM25 depends on, as JSON has it."""
    manifest = index.manifest
    return {
        "bm25s": version("bm25s"),
        "passages": [segment.files["passages"].sha256 for segment in manifest.segments],
        "removed": manifest.removed and manifest.removed.sha256,
    }


def _read(place: Path, state: dict[str, Any]) -> BM25:
    kept = json.loads((place / _KEPT).read_text("utf-8"))
    if kept["state"] != state or any(sha256(place / name) != digest for name, digest in kept["files"].items()):
        raise ValueError("of another state, or damaged")
    return BM25.load(place)


def _write(bm25: BM25, place: Path, state: dict[str, Any]) -> None:
    with atomic_folder(place, marker=_KEPT) as new:
        bm25.save(new)
        files = {path.name: sha256(path) for path in sorted(new.iterdir())}
        (new / _KEPT).write_text(json.dumps({"state": state, "files": files}) + "\n", encoding="utf-8")
