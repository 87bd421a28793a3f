"""Checkpoints that are whole or absent, checked before a run goes on from one."""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from cosup.config import UserError
from cosup.files import atomic_file, sha256
from cosup.model import CoSupModel

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
"""Folder beside the checkpoints in which one is written."""

WEIGHTS = "model.safetensors"
"""The trained weights of a checkpoint, whole."""

SHARDS = "shards"
"""Folder of the same, as FSDP2 spreads them."""

_PROJECTION = "projection.weight"
_MANIFEST = "checksums.json"
_KEPT = 2


def save_trained(model: CoSupModel, folder: Path) -> None:
    """Writes the weights that are trained, and the projection, which is fitted; others are as the recipe starts them.

    To `model.safetensors`, or, where FSDP2 spreads them over processes, each process's part to `shards/`: every process
    has to call it then, and none gathers the whole.

    Args:
        model: knows which are trained.
        folder: is there.
    """
    weights = {name: p.detach() for name, p in _kept(model).items()}
    if is_sharded(model):
        (folder / SHARDS).mkdir(exist_ok=True)
        save(weights, storage_writer=HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True))
        return
    whole = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 spreads the weights over processes."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights that FSDP2 spreads, gathered in the first process's memory; every process has to call it."""
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], gathered)


def load_trained(model: CoSupModel, folder: Path) -> None:
    """Puts back what `save_trained` wrote, whether it or `model` is sharded, over any number of processes.

    Where `model` is sharded, every process has to call it. A frozen projection stays as it is where the checkpoint, of
    an earlier version, lacks it; see `holds_projection`.

    Raises:
        UserError: it is of another model.
    """
    reader = HuggingFaceStorageReader(str(weights_in(folder)))
    held = _held(reader)
    weights = {name: p.detach() for name, p in _kept(model).items() if p.requires_grad or name in held}
    if {name: weight.shape for name, weight in weights.items()} != {name: w.size for name, w in held.items()}:
        raise UserError(f"{folder} holds the weights of another model; name the recipe that it was trained with")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a process that loads alone is told that it does
        load(weights, storage_reader=reader, no_dist=not is_sharded(model))  # in their place


def holds_projection(folder: Path) -> bool:
    """Whether a checkpoint holds the projection. Raises UserError if it has no weights."""
    return _PROJECTION in _held(HuggingFaceStorageReader(str(weights_in(folder))))


def weights_in(folder: Path) -> Path:
    """Where the `safetensors` files of a checkpoint are. Raises UserError if it has none."""
    for place in (folder / SHARDS, folder):
        if any(place.glob("*.safetensors")):
            return place
    raise UserError(f"{folder} has no {WEIGHTS}, so it is not a whole checkpoint; name another")


def _held(reader: HuggingFaceStorageReader) -> Mapping[str, Any]:
    held: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    return held


def _kept(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad or name == _PROJECTION}


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
