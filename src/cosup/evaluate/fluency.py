"""MAUVE: how near the distribution of answers is to that of people's answers."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cosup.config import UserError

_TOKENS = 1024


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
    state = random.getstate(), np.random.get_state()
    try:
        result: Any = compute_mauve(
            p_features=_features(predictions, model), q_features=_features(references, model), seed=seed, verbose=False
        )
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
    return float(result.mauve)


@torch.inference_mode()
def _features(texts: Sequence[str], name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    from transformers import AutoModel, AutoTokenizer

    try:
        model, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise UserError(f"the model {name} of MAUVE can't be loaded ({str(e).splitlines()[0]})") from None
    limit = min(_TOKENS, getattr(model.config, "max_position_embeddings", _TOKENS))
    states = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        states.append(model(**ids).last_hidden_state[0, -1].float().cpu().numpy())
    return np.stack(states)
