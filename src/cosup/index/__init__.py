"""Passages with their vectors in one folder: built, opened, searched."""

from cosup.index.bm25 import BM25
from cosup.index.build import build_index
from cosup.index.flat import FlatIndex
from cosup.index.protocol import Embedder, Hit, Index

__all__ = ["BM25", "Embedder", "FlatIndex", "Hit", "Index", "build_index"]
