"""Checkpoints that are whole or absent, checked before a run goes on from one."""

import json
import logging
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cosup.config import UserError
from cosup.files import atomic_file, sha256
from cosup.model import CoSupModel

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
"""Folder beside the checkpoints in which one is written."""

_MANIFEST = "checksums.json"
_KEPT = 2


def save_trained(model: CoSupModel, folder: Path) -> None:
    """Writes the weights that are trained to `model.safetensors`; the others are those that the recipe starts from."""
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_trained(model: CoSupModel, folder: Path) -> None:
    """Puts back what `save_trained` wrote. Raises UserError if it is of another model."""
    weights = load_file(folder / "model.safetensors")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: p.shape for name, p in trained.items()}
    if shapes != {name: weight.shape for name, weight in weights.items()}:
        raise UserError(f"{folder} holds the weights of another model; name the recipe that it was trained with")
    with torch.no_grad():
        for name, weight in weights.items():
            trained[name].copy_(weight)


def names_in(folder: Path) -> set[str]:
    """The names of the weights in a checkpoint."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def finish_checkpoint(folder: Path, step: int, *, best: Path | None) -> None:
    """Gives a complete checkpoint its name, and removes those before the last two, but never the best.

    Args:
        folder: of the run's checkpoints.
        step: of the one in `UNFINISHED`.
        best: path of the best checkpoint, where there is one.
    """
    written = folder / UNFINISHED / f"checkpoint-{step}"
    sums = {str(file.relative_to(written)): sha256(file) for file in sorted(written.rglob("*")) if file.is_file()}
    with atomic_file(written / _MANIFEST) as file:
        file.write((json.dumps(sums, indent=2) + "\n").encode())
    final = folder / written.name
    if final.exists():  # damaged, or the run would have gone on from it
        shutil.rmtree(final)
    written.rename(final)
    shutil.rmtree(folder / UNFINISHED)
    for old in _by_step(folder)[:-_KEPT]:
        if old != best:
            shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is undamaged; each damaged one is named in a warning.

    Args:
        folder: of the run's checkpoints; what was not finished there is removed.
    """
    for checkpoint in reversed(_by_step(folder)):
        damaged = _damaged(checkpoint)
        if damaged is None:
            return checkpoint
        logger.warning("%s is damaged (%s); going back to the checkpoint before", checkpoint, damaged)
    return None


def _by_step(folder: Path) -> list[Path]:
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(path.name.split("-")[1]))


def _damaged(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((checkpoint / _MANIFEST).read_text("utf-8"))
        for name, expected in sums.items():
            if sha256(checkpoint / name) != expected:
                return f"{name} has another checksum"
    except (OSError, ValueError, AttributeError) as e:
        return " ".join(str(e).split())
    return None
