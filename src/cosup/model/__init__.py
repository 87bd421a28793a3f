"""Gen and Emb_seq as one model: packed training passes, embedding, folders on disk."""

from cosup.model.core import CoSupModel, Output, goes_on
from cosup.model.folders import AnswerSettings, ModelSettings
from cosup.model.lms import Dtype, body_of, compute_dtype, find_model, keep_freed_memory
from cosup.model.packing import Batch, batches_by_tokens, chunk_count, chunks, pack, tokens_of
from cosup.model.published import import_published
from cosup.model.shapes import sketch

__all__ = [
    "AnswerSettings",
    "Batch",
    "CoSupModel",
    "Dtype",
    "ModelSettings",
    "Output",
    "batches_by_tokens",
    "body_of",
    "chunk_count",
    "chunks",
    "compute_dtype",
    "find_model",
    "goes_on",
    "import_published",
    "keep_freed_memory",
    "pack",
    "sketch",
    "tokens_of",
]
