"""MAUVE: how near the distribution of answers is to that of people's answers."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cosup.config import UserError
from cosup.evaluate.judges import load_part, load_weights

_TOKENS = 1024
_ROLE = "MAUVE's model"


def mauve(predictions: Sequence[str], references: Sequence[str], model: str, *, seed: int = 0) -> float:
    """MAUVE between answers and references, in [0, 1].

    Args:
        predictions, references: at least two each, none empty.
        model: a causal LM of Hugging Face, or its folder, whose last state stands for a text; the source takes
            GPT-2 large, and figures of different models can't be compared.
        seed: of the clustering.

    Raises:
        UserError: `mauve-text` is not installed, or the model can't be loaded.

    Source:
        Pillutla et al., MAUVE (NeurIPS 2021), by its authors' package.
    """
    try:
        from mauve import compute_mauve
    except ImportError:
        raise UserError("MAUVE needs the package mauve-text: pip install 'cosup[eval]'") from None
    features = _features([*predictions, *references], model)
    state = random.getstate(), np.random.get_state()
    try:
        result: Any = compute_mauve(
            p_features=features[: len(predictions)], q_features=features[len(predictions) :], seed=seed, verbose=False
        )
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
    return float(result.mauve)


@torch.inference_mode()
def _features(texts: Sequence[str], name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The last state [D] of each text, one text at a time: no padding that a vector could depend on."""
    from transformers import AutoModel, AutoTokenizer

    model = load_weights(AutoModel, name, role=_ROLE)
    tokenizer = load_part(AutoTokenizer, name, role=_ROLE)
    limit = min(_TOKENS, getattr(model.config, "max_position_embeddings", _TOKENS))
    states = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
        states.append(model(**ids).last_hidden_state[0, -1].float().cpu().numpy())
    return np.stack(states)
