"""Language models that retrieve while they write: token and sequence co-supervision, with citations.

Public names are imported when they are first used, so that importing cosup imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosup.config import Recipe, UserError, load_recipe
    from cosup.data import Evidence, Example, Passage, Question, Text
    from cosup.engine import Engine, Options
    from cosup.evaluate import evaluate_model
    from cosup.index import FaissIndex, build_index
    from cosup.model import CoSupModel
    from cosup.train import train_recipe

_HOMES = {
    "Recipe": "config",
    "UserError": "config",
    "load_recipe": "config",
    "Evidence": "data",
    "Example": "data",
    "Passage": "data",
    "Question": "data",
    "Text": "data",
    "Engine": "engine",
    "Options": "engine",
    "evaluate_model": "evaluate",
    "FaissIndex": "index",
    "build_index": "index",
    "CoSupModel": "model",
    "train_recipe": "train",
}

__all__ = [
    "CoSupModel",
    "Engine",
    "Evidence",
    "Example",
    "FaissIndex",
    "Options",
    "Passage",
    "Question",
    "Recipe",
    "Text",
    "UserError",
    "build_index",
    "evaluate_model",
    "load_recipe",
    "train_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cosup' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cosup.{_HOMES[name]}"), name)
