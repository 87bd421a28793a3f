"""From a checkpoint or a finished run to a model folder of plain Hugging Face folders."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cosup.config import UserError, load_recipe
from cosup.files import atomic_folder
from cosup.model import CoSupModel, Dtype, compute_dtype, find_model
from cosup.model.folders import retype, set_answers
from cosup.train.checkpoints import holds_projection, load_trained, weights_in
from cosup.train.run import are_strangers, model_card, start_model


def export_model(
    source: Path,
    out: Path,
    *,
    merge: bool = False,
    dtype: Dtype = "auto",
    answers: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model folder, which everything else of cosup opens, and whose `gen/` and `emb/` are Hugging Face's.

    Args:
        source: a checkpoint of a run, `RUN/checkpoints/checkpoint-N`, or a run or model folder.
        out: the model folder to write; one that is there is replaced.
        merge: whether adapters are merged into full weights; without, they stay adapters on the base that they name.
        dtype: of the weights; `auto` leaves them as they are.
        answers: how its answers are best written, some fields of `AnswerSettings`; others stay as they are.

    Raises:
        UserError: there is nothing of the kind at `source`, it is damaged, `out` is not ours to replace, or a value is
            out of range.
    """
    with atomic_folder(out, marker="cosup.json") as new:
        _export(source, out, new, merge=merge)
        if dtype != "auto":
            retype(new, compute_dtype(dtype, "cpu"))
        if answers:
            set_answers(new, answers)


def _export(source: Path, out: Path, new: Path, *, merge: bool) -> None:
    if is_checkpoint(source):
        _export_checkpoint(source, new, merge=merge)
        return
    folder = find_model(source)
    if folder.resolve() == out.resolve():
        raise UserError(f"{out} is the model itself; name another folder with --out")
    if merge and any(folder.glob("*/adapter_config.json")):
        card = folder / "README.md"
        text = card.read_text("utf-8") if card.is_file() else ""
        CoSupModel.load(folder, dtype="float32", device="cpu").save(new, card=text)
    else:
        shutil.copytree(folder, new, dirs_exist_ok=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, and no model folder."""
    return (folder / "trainer_state.json").is_file()


def _export_checkpoint(checkpoint: Path, out: Path, *, merge: bool) -> None:
    recipe = checkpoint.parent.parent / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(f"{checkpoint} is not inside its run: {recipe} is missing, which says what it was trained from")
    settings = load_recipe(recipe)
    model = start_model(settings).to(_dtype(checkpoint))
    load_trained(model, checkpoint)
    if are_strangers(settings, model) and not holds_projection(checkpoint):
        raise UserError(
            f"{checkpoint} lacks its frozen projection, which an earlier version did not save: run `cosup train` again "
            "to its end, and export the run"
        )
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    model.save(out, card=model_card(settings, state["log_history"]), merge=merge)


def _dtype(checkpoint: Path) -> torch.dtype:
    """What the weights of a checkpoint were trained in."""
    file = next(weights_in(checkpoint).glob("*.safetensors"))
    with safe_open(file, framework="pt") as weights:
        dtype: torch.dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    return dtype
