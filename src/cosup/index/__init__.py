"""Passages with their vectors in one place: built, opened, searched, changed."""

from pathlib import Path

from cosup.index.bm25 import BM25
from cosup.index.build import build_collection, build_index
from cosup.index.estimate import Estimate, estimate_build
from cosup.index.folder import FaissIndex
from cosup.index.hybrid import HybridIndex
from cosup.index.mine import Mined, Rules, mine
from cosup.index.protocol import Embedder, EmbedderFactory, Hit, Index, MeasuringEmbedder, PassageTooLargeError
from cosup.index.sources import Source
from cosup.index.update import Soundness, Update, check_index, refuse_other, update_index

__all__ = [
    "BM25",
    "Embedder",
    "EmbedderFactory",
    "Estimate",
    "FaissIndex",
    "Hit",
    "HybridIndex",
    "Index",
    "MeasuringEmbedder",
    "Mined",
    "PassageTooLargeError",
    "Rules",
    "Soundness",
    "Source",
    "Update",
    "build_collection",
    "build_index",
    "check_index",
    "estimate_build",
    "mine",
    "open_index",
    "refuse_other",
    "update_index",
]


def open_index(place: Path | str) -> Index:
    """Opens an index: a folder, or `milvus://` with what `cosup.index.milvus.MilvusIndex` understands.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if str(place).startswith("milvus:"):
        from cosup.index.milvus import MilvusIndex

        return MilvusIndex(str(place))
    return FaissIndex(place)
