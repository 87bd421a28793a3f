"""A run: from a recipe to a folder with the resolved recipe, versions, metrics, curves and the model."""

import importlib.metadata
import json
import logging
import os
import platform
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback

from cosup.config import Recipe, UserError, dump_recipe, load_recipe
from cosup.files import atomic_file, explained
from cosup.model import CoSupModel, compute_dtype, goes_on
from cosup.template import TemplateSettings
from cosup.train.checkpoints import holds_projection, is_sharded, newest_checkpoint, whole_weights
from cosup.train.collate import Collator, NeighbourSampler
from cosup.train.estimate import expectations
from cosup.train.layers import quicken
from cosup.train.parts import choose_trained, save_activations
from cosup.train.tokenized import TrainingData, load_data
from cosup.train.trainer import CoSupTrainer, MetricsFile

logger = logging.getLogger(__name__)

_FITTED = 4096  # examples by which a projection is fitted before the first step


def train_recipe(
    recipe: Recipe | Path | str,
    out: Path | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    on_start: Callable[[dict[str, str]], None] = lambda table: None,
) -> Path:
    """Trains what a recipe says, or goes on where an interrupted run of it stopped; a finished run is left as it is.

    Args:
        recipe: a recipe, or the path of its YAML.
        out: the run folder; `runs/<name>` without it.
        callbacks: of transformers, for instance a progress bar.
        on_start: is told what will be trained.

    Returns:
        The run folder: `recipe.yaml`, `versions.json`, `metrics.jsonl`, `curves.png`, and the model in `model/`.

    Raises:
        UserError: the recipe or its data is wrong, the folder holds another recipe's run, or the loss is not finite.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    run = out or Path("runs") / recipe.name
    processes = PartialState(cpu=not torch.accelerator.is_available())
    _refuse_another(run, recipe)
    if (run / "model" / "cosup.json").is_file():
        return run
    model = start_model(recipe)
    data = load_data(recipe, model.template, context=model.context)
    model.to(compute_dtype(recipe.train.dtype, processes.device.type))
    compiled = quicken(model, recipe.train.compile, device=processes.device.type)
    with explained(run):  # before the folder is claimed: a mistake in `train.trainer` does not take it
        trainer = _trainer(recipe, model, data, run, callbacks if processes.is_main_process else ())
    if processes.is_main_process:
        _claim(run, recipe)
        on_start(_summary(recipe, model, data, compiled=compiled) | expectations(recipe, model, data))
    processes.wait_for_everyone()
    with explained(run):
        checkpoint = newest_checkpoint(run / "checkpoints")
        if checkpoint is None or not holds_projection(checkpoint):
            _meet(recipe, model, data, trainer.args.device)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if data.shortened:
        logger.warning(
            "%d passages were shortened to data.max_passage_tokens = %d",
            data.shortened,
            recipe.data.max_passage_tokens,
        )
    weights = whole_weights(model) if is_sharded(model) else None
    if processes.is_main_process:
        plot_curves(run)
        finished = model if weights is None else _filled(recipe, weights)
        finished.save(run / "model", card=model_card(recipe, trainer.state.log_history))
    processes.wait_for_everyone()
    return run


def start_model(recipe: Recipe) -> CoSupModel:
    """The model that a recipe starts from, in float32, with what it does not train frozen."""
    layout = TemplateSettings(max_passage_tokens=recipe.data.max_passage_tokens)
    retriever = recipe.train.objective == "separate"
    model = CoSupModel.start(recipe.model, seed=recipe.seed, template=layout, retriever=retriever)
    if model.passage_limit < recipe.data.max_passage_tokens:
        raise UserError(
            f"data.max_passage_tokens is {recipe.data.max_passage_tokens}, and Emb_seq reads at most "
            f"{model.passage_limit} tokens: lower it"
        )
    choose_trained(model, recipe)
    if recipe.train.activation_checkpointing:
        save_activations(model)
    return model


def _filled(recipe: Recipe, weights: dict[str, Tensor]) -> CoSupModel:
    """A model in this process alone, with weights that were gathered from all."""
    model = start_model(recipe).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    return model


def _trainer(
    recipe: Recipe, model: CoSupModel, data: TrainingData, run: Path, callbacks: Sequence[TrainerCallback]
) -> CoSupTrainer:
    return CoSupTrainer(
        model,
        examples=data.examples,
        dev=data.dev if len(data.dev) else None,
        sampler=NeighbourSampler(data.examples.groups(), size=recipe.train.neighbours, seed=recipe.seed),
        collator=Collator(data.sequences, recipe.train),
        section=recipe.train,
        folder=run,
        seed=recipe.seed,
        callbacks=[*callbacks, MetricsFile(run / "metrics.jsonl")],
    )


def are_strangers(recipe: Recipe, model: CoSupModel) -> bool:
    """Whether the projection of the model that a recipe starts from is fitted before the first step."""
    return model.projection is not None and recipe.train.objective != "ntp" and not goes_on(recipe.model)


def _meet(recipe: Recipe, model: CoSupModel, data: TrainingData, device: torch.device) -> None:
    """Fits a projection that has learnt nothing yet to retrievals of the training data."""
    if not are_strangers(recipe, model):
        return
    assert model.projection is not None
    drawn = random.Random(recipe.seed).sample(range(len(data.examples)), min(_FITTED, len(data.examples)))
    rows = [row for row in map(data.examples.__getitem__, drawn) if row.ret]
    if not rows:
        return
    before, training = model.device, model.training
    with torch.compiler.set_stance("force_eager"):  # what is compiled is compiled for training
        model.to(device).eval()
        model.fit_projection([row.ids[: row.ret[0] + 1] for row in rows], [data.sequences[row.gold[0]] for row in rows])
    model.to(before).train(training)


def remove_run(run: Path) -> None:
    """Removes a run folder; one that `cosup train` did not write is refused."""
    if run.exists():
        if not (run / "recipe.yaml").is_file():
            raise UserError(f"{run} is not a run folder, so it is not removed; name another with --out")
        shutil.rmtree(run)


def plot_curves(run: Path) -> None:
    """Draws the losses and the in-batch retrieval accuracy of `metrics.jsonl` to `curves.png`."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    panels = {"ntp": "L_NTP (nats per token)", "nsp": "L_NSP (nats)", "accuracy": "in-batch retrieval accuracy"}
    drawn = [name for name in panels if any(name in row for row in rows)]
    figure = Figure(figsize=(4.2 * max(len(drawn), 1), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(len(drawn), 1), squeeze=False)[0], drawn, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), color="#2458a6", linewidth=1.6)
        axes.set(title=panels[name], xlabel="optimisation step", ylim=(0, 1.02) if name == "accuracy" else (0, None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(run / "curves.png") as file:
        figure.savefig(file, dpi=130, format="png")


def _refuse_another(run: Path, recipe: Recipe) -> None:
    saved = run / "recipe.yaml"
    if saved.is_file() and saved.read_text("utf-8") != dump_recipe(recipe):
        raise UserError(
            f"{run} holds a run of another recipe; name another folder with --out, or start over with --fresh"
        )


def _claim(run: Path, recipe: Recipe) -> None:
    """Makes the run folder this recipe's; not before its data was read, so that a mistake there leaves nothing."""
    if (run / "recipe.yaml").is_file():
        return
    with atomic_file(run / "versions.json") as file:
        file.write((json.dumps(_versions(), indent=2) + "\n").encode())
    with atomic_file(run / "recipe.yaml") as file:
        file.write(dump_recipe(recipe).encode())


def _versions() -> dict[str, str]:
    packages = ("cosup", "torch", "transformers", "accelerate", "numpy")
    command = ["git", "describe", "--always", "--abbrev=40", "--match=", "--dirty"]  # says where code was not committed
    commit = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        **{package: importlib.metadata.version(package) for package in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git_commit": commit.stdout.strip() or "unknown",
    }


def _summary(recipe: Recipe, model: CoSupModel, data: TrainingData, *, compiled: bool) -> dict[str, str]:
    """What is shown before a run of what the recipe says; see `expectations` for what follows from it."""
    section = recipe.train
    limits = [(f"{section.epochs:g}", "epochs"), (section.max_steps, "steps"), (section.max_minutes, "minutes")]
    table = {
        "objective": section.objective + (f", lambda {section.lambda_:g}" if section.objective == "ntp+nsp" else ""),
        "examples": f"{len(data.examples):,} over {data.passages:,} passages, {section.batch_size} a step",
        "until": " or ".join(f"{limit} {unit}" for limit, unit in limits if limit),
        "computes in": str(next(model.parameters()).dtype).removeprefix("torch.") + (", compiled" if compiled else ""),
    }
    if are_strangers(recipe, model):
        table["begins with"] = f"fitting the projection to {min(_FITTED, len(data.examples)):,} examples"
    if data.left_out:
        table["left out"] = ", ".join(f"{count:,} ({reason})" for reason, count in data.left_out.items())
    return table


def model_card(recipe: Recipe, history: list[dict[str, Any]]) -> str:
    """Text of the model card: what was last logged, and the recipe."""
    last: dict[str, Any] = next((row for row in reversed(history) if "tokens_per_second" in row), {})
    figures = "\n".join(f"- {name}: {last[name]:.3f}" for name in ("ntp", "nsp", "accuracy") if name in last)
    return (
        f"# {recipe.name}\n\nA model of `cosup`: `gen/` writes and retrieves, `emb/` embeds passages.\n\n"
        f"Last logged, on training batches:\n\n{figures}\n\nRecipe:\n\n```yaml\n{dump_recipe(recipe)}```\n"
    )
