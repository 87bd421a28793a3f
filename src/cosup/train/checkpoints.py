"""Checkpoints that are whole or absent, checked before a run goes on from one."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from cosup.config import UserError
from cosup.files import atomic_file, sha256
from cosup.model import CoSupModel

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
"""Folder beside the checkpoints in which one is written."""

_MANIFEST = "checksums.json"
_KEPT = 2


def save_trained(model: CoSupModel, folder: Path, *, whole: Mapping[str, Tensor] | None = None) -> None:
    """Writes the weights that are trained to `model.safetensors`; the others are those that the recipe starts from.

    Args:
        model: knows which are trained.
        folder: is there.
        whole: the weights by name, where those of `model` are sharded.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: (whole[name] if whole else p).detach().contiguous() for name, p in trained.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 spreads the weights over processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights that FSDP2 spreads, gathered in the first process's memory; every process has to call it."""
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], gathered)


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
    for old in checkpoints_in(folder)[:-_KEPT]:
        if old != best:
            shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is undamaged; each damaged one is named in a warning.

    Args:
        folder: of the run's checkpoints; what was not finished there is passed over.
    """
    for checkpoint in reversed(checkpoints_in(folder)):
        damaged = _damaged(checkpoint)
        if damaged is None:
            return checkpoint
        logger.warning("%s is damaged (%s); going back to the checkpoint before", checkpoint, damaged)
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder of checkpoints, in the order of their steps."""
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
