"""Co-supervised training: the collator, a transformers.Trainer with both losses, and a run from a recipe.

Shapes: S packed tokens, L labelled tokens, K retrieval positions, N candidates.
"""

import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from cosup import losses
from cosup.config import Objective, Recipe, TrainSection, UserError, dump_recipe, load_recipe
from cosup.data import Example, Passage, kind_of, read_examples, read_passages, read_questions
from cosup.data.convert import convert
from cosup.files import atomic_file
from cosup.model import Batch, CoSupModel, Output, compute_dtype
from cosup.template import IGNORED, Rendered, Template, TemplateSettings

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


class Collator:
    """Renders examples and packs them into one step's `Batch`.

    Args:
        template: the model's.
        passages: by id, all that the examples cite.
        section: the recipe's `train`.
    """

    def __init__(self, template: Template, passages: Mapping[str, Passage], section: TrainSection):
        self.template, self.passages, self.section = template, passages, section

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """The batch of these examples."""
        rows = [self.render(example) for example in examples]
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + len(row.ids))
        batch: Batch = {
            "gen_ids": torch.tensor([i for row in rows for i in row.ids]),
            "gen_lengths": [len(row.ids) for row in rows],
            "example_ids": [example.id for example in examples],
        }
        if "ntp" in self.section.objective.split("+"):
            self._add_labels(batch, rows, starts)
        if "nsp" in self.section.objective.split("+"):
            self._add_candidates(batch, rows, starts)
        return batch

    def render(self, example: Example) -> Rendered:
        """The training sequence of one example."""
        return self.template.render(example, self.passages, train_on_passages=self.section.train_on_passages)

    def _add_labels(self, batch: Batch, rows: list[Rendered], starts: list[int]) -> None:
        places = [
            (start + t - 1, label)
            for start, row in zip(starts, rows, strict=False)
            for t, label in enumerate(row.labels)
            if label != IGNORED
        ]
        batch["label_positions"] = torch.tensor([place for place, _ in places])
        batch["labels"] = torch.tensor([label for _, label in places])

    def _add_candidates(self, batch: Batch, rows: list[Rendered], starts: list[int]) -> None:
        """The distinct passages of the whole step, golds first, and who may not count which as a negative."""
        gold = [passage for row in rows for passage in row.gold]
        if not gold:
            return
        hard = [n for row in rows for negatives in row.negatives for n in negatives[: self.section.negatives]]
        column = {passage: j for j, passage in enumerate(dict.fromkeys([*gold, *hard]))}
        ignored = [passages for row in rows for passages in row.ignored]
        ignore_KN = torch.zeros(len(gold), len(column), dtype=torch.bool)
        for k, passages in enumerate(ignored):
            ignore_KN[k, [column[p] for p in passages if p in column]] = True
        limit = self.template.settings.max_passage_tokens
        sequences = [self.template.embedded(self.passages[p], max_tokens=limit) for p in column]
        batch["ret_positions"] = torch.tensor(
            [start + t for start, row in zip(starts, rows, strict=False) for t in row.ret]
        )
        batch["emb_ids"] = torch.tensor([i for sequence in sequences for i in sequence])
        batch["emb_lengths"] = [len(sequence) for sequence in sequences]
        batch["gold"] = torch.tensor([column[passage] for passage in gold])
        batch["ignore"] = ignore_KN


def objective_loss(
    output: Output, batch: Batch, *, objective: Objective, lambda_: float, temperature: float
) -> tuple[Tensor, Metrics]:
    """L = L_NTP + lambda * L_NSP over one step, and what there is to log of it.

    Args:
        output: of the model.
        batch: that it was given.
        objective: `nsp` alone has weight 1.
        lambda_: weight of L_NSP in `ntp+nsp`.
        temperature: tau.

    Source:
        Lee et al. 2024 (arXiv 2403.09024), section 3.
    """
    ntp = output.ntp_sum / max(output.ntp_count, 1)
    metrics = {"ntp_sum": float(output.ntp_sum.detach()), "ntp_count": float(output.ntp_count)}
    if not len(output.queries_KD):
        return ntp, metrics
    count = len(output.queries_KD)
    nsp_sum = losses.nsp(
        output.queries_KD,
        output.candidates_ND,
        gold_K=batch["gold"],
        ignore_KN=batch["ignore"],
        temperature=temperature,
    )
    best_K = losses.nearest(output.queries_KD.detach(), output.candidates_ND.detach(), ignore_KN=batch["ignore"])
    metrics |= {
        "nsp_sum": float(nsp_sum.detach()),
        "nsp_count": float(count),
        "nsp_right": float((best_K == batch["gold"]).sum()),
        "candidates": float(len(output.candidates_ND)),
    }
    return (ntp + lambda_ * nsp_sum / count if objective == "ntp+nsp" else nsp_sum / count), metrics


class CoSupTrainer(Trainer):
    """A transformers.Trainer that trains a CoSupModel on examples.

    Args:
        model: in float32; bfloat16 weights get float32 masters.
        examples: what is learnt.
        collator: packs them.
        section: the recipe's `train`.
        folder: of the run; checkpoints go to `checkpoints/` in it.
        seed: of order and dropout.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: CoSupModel,
        *,
        examples: Dataset[Example],
        collator: Collator,
        section: TrainSection,
        folder: Path,
        seed: int,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.section = section
        self.clock = Clock(section)
        self._sums: Counter[str] = Counter()
        self._since = time.perf_counter()
        super().__init__(
            model=model,
            args=_arguments(section, folder, seed),
            train_dataset=examples,
            data_collator=collator,
            callbacks=[*callbacks, self.clock],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The step's loss, whose parts are kept for the log. Raises UserError if it is not finite."""
        settings = self.accelerator.unwrap_model(model).settings
        output = model(inputs)
        loss, metrics = objective_loss(
            output,
            inputs,
            objective=self.section.objective,
            lambda_=self.section.lambda_,
            temperature=settings.temperature,
        )
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} "
                f"(examples {', '.join(inputs['example_ids'])}): lower train.learning_rate, or check these examples"
            )
        self._sums.update(metrics)
        self._sums["steps"] += 1
        self._sums["tokens"] += len(inputs["gen_ids"]) + sum(inputs.get("emb_lengths", ()))
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds both losses, in-batch retrieval accuracy, candidates and real tokens per second to the Trainer's log."""
        if self._sums["steps"]:
            logs |= _means(self._sums, time.perf_counter() - self._since)
            self._sums.clear()
            self._since = time.perf_counter()
        logs["minutes"] = round(self.clock.minutes(), 3)
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over everything that is trained; weight decay, if any, on matrices only."""
        if self.optimizer is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            groups = [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.section.weight_decay},
                {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
            ]
            half = any(p.dtype == torch.bfloat16 for p in trained)
            optimizer = MasterAdamW if half else torch.optim.AdamW
            self.optimizer = optimizer(groups, lr=self.section.learning_rate, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A rate that follows the run's progress in steps or in minutes, whichever is further."""
        if self.lr_scheduler is None:
            rate = rate_at(self.section)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: rate(self.clock.progress(step, num_training_steps))
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # save_model knows that the embedding and the head are one matrix; the Trainer's own way refuses it
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / "model.safetensors"))


class Clock(TrainerCallback):
    """Time spent training, over all sittings of a run, and the end of a run that has a budget in minutes."""

    def __init__(self, section: TrainSection):
        self._budget = section.max_minutes
        self._before = 0.0
        self._started: float | None = None

    def minutes(self) -> float:
        """Minutes of training so far."""
        return self._before + ((time.perf_counter() - self._started) / 60 if self._started is not None else 0.0)

    def progress(self, step: int, steps: int) -> float:
        """Share of the run that is done, 0 to 1, by steps or by minutes."""
        by_time = self.minutes() / self._budget if self._budget else 0.0
        return min(1.0, max(step / max(steps, 1), by_time))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Goes on from the minutes that a checkpoint tells of."""
        logged = [row["minutes"] for row in state.log_history if "minutes" in row]
        self._before = logged[-1] if logged else 0.0
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends the run when the budget is spent."""
        if self._budget and self.minutes() >= self._budget:
            control.should_training_stop = True
            control.should_log = True


class MasterAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights: moments and masters in float32, rounded to the weights after each step.

    Without masters, a step smaller than a 256th of a weight would be lost.

    Args:
        params: as torch.optim.AdamW takes them.
        lr: learning rate.
        fused: as torch.optim.AdamW takes it.
    """

    def __init__(self, params: Any, *, lr: float, fused: bool = False):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        masters = [
            {**group, "params": [p.detach().float().requires_grad_() for p in group["params"]]}
            for group in self.param_groups
        ]
        self._inner = torch.optim.AdamW(masters, lr=lr, fused=fused)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of AdamW on the masters."""
        loss = closure() if closure is not None else None
        for ours, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["lr"], inner["weight_decay"] = ours["lr"], ours["weight_decay"]
        for weight, master in self._pairs():
            master.grad = None if weight.grad is None else weight.grad.float()
        self._inner.step()
        for weight, master in self._pairs():
            weight.copy_(master)
            master.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Moments, masters and groups."""
        return {
            "state": self._inner.state_dict()["state"],
            "param_groups": super().state_dict()["param_groups"],
            "masters": [master for _, master in self._pairs()],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        groups = self._inner.state_dict()["param_groups"]
        self._inner.load_state_dict({"state": state_dict["state"], "param_groups": groups})
        for (_, master), saved in zip(self._pairs(), state_dict["masters"], strict=True):
            master.copy_(saved)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [
            pair
            for ours, inner in zip(self.param_groups, self._inner.param_groups, strict=True)
            for pair in zip(ours["params"], inner["params"], strict=True)
        ]


def rate_at(section: TrainSection) -> Callable[[float], float]:
    """The factor of the learning rate at a progress from 0 to 1: a linear rise, then the schedule."""

    def rate(progress: float) -> float:
        if progress < section.warmup:
            return max(progress / section.warmup, 0.01)
        rest = (progress - section.warmup) / (1 - section.warmup)
        return {
            "linear": 1 - rest,
            "cosine": (1 + math.cos(math.pi * rest)) / 2,
            "constant": 1.0,
        }[section.schedule]

    return rate


class ExampleDataset(Dataset[Example]):
    """Examples in memory; they are rendered when a batch needs them."""

    def __init__(self, examples: Sequence[Example]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row: int) -> Example:
        return self._examples[row]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a recipe's `data` names, read and checked.

    Args:
        examples: those that fit.
        passages: by id.
        left_out: how many questions or examples were not used, by reason.
    """

    examples: list[Example]
    passages: dict[str, Passage]
    left_out: Counter[str]


def load_data(recipe: Recipe, template: Template) -> TrainingData:
    """Reads the training data of a recipe.

    Raises:
        UserError: a file is missing or malformed, a citation leads nowhere, or nothing is left to train on.
    """
    section = recipe.data
    passages = {p.id: p for p in read_passages(*map(section.resolve, section.passages))}
    titles = {p.id: p.title for p in passages.values()}
    left_out: Counter[str] = Counter()
    examples: list[Example] = []
    for path in map(section.resolve, section.train):
        if kind_of(path) == "questions":
            examples += convert(read_questions(path), passages=passages, titles=titles, left_out=left_out)
        else:
            examples += read_examples(path)
    fitting = [example for example in examples if _fits(example, passages, template, section.max_tokens)]
    if len(fitting) < len(examples):
        left_out["longer than data.max_tokens"] = len(examples) - len(fitting)
    if not fitting:
        raise UserError(f"there is nothing to train on: {dict(left_out) or 'the files hold no examples'}")
    return TrainingData(fitting, passages, left_out)


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
        The run folder, which holds `recipe.yaml`, `versions.json`, `metrics.jsonl`, `curves.png`, and the model in `model/`.

    Raises:
        UserError: the recipe or its data is wrong, the folder holds another recipe's run, or the loss is not finite.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    run = out or Path("runs") / recipe.name
    _refuse_several_processes()
    _claim(run, recipe)
    if (run / "model" / "cosup.json").is_file():
        return run
    layout = TemplateSettings(max_passage_tokens=recipe.data.max_passage_tokens)
    model = CoSupModel.start(recipe.model, seed=recipe.seed, template=layout)
    data = load_data(recipe, model.template)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(compute_dtype(recipe.train.dtype, device))
    on_start(_summary(recipe, model, data))
    trainer = CoSupTrainer(
        model,
        examples=ExampleDataset(data.examples),
        collator=Collator(model.template, data.passages, recipe.train),
        section=recipe.train,
        folder=run,
        seed=recipe.seed,
        callbacks=[*callbacks, MetricsFile(run / "metrics.jsonl")],
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(run))
    if model.template.shortened:
        logger.warning(
            "%d passages were shortened to data.max_passage_tokens = %d",
            len(model.template.shortened),
            recipe.data.max_passage_tokens,
        )
    plot_curves(run)
    model.save(run / "model", card=_card(recipe, trainer.state.log_history))
    return run


class MetricsFile(TrainerCallback):
    """Appends each log to a JSONL file; lines after the checkpoint that a run goes on from are dropped."""

    def __init__(self, path: Path):
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keeps the lines up to the step that the run starts at."""
        lines = self._path.read_text("utf-8").splitlines() if self._path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        with atomic_file(self._path) as file:
            file.write("".join(line + "\n" for line in kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One line a log."""
        if state.is_world_process_zero and logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


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


def _arguments(section: TrainSection, folder: Path, seed: int) -> TrainingArguments:
    ours: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": section.batch_size,
        "num_train_epochs": section.epochs,
        "max_steps": section.max_steps or -1,
        "max_grad_norm": section.max_grad_norm,
        "learning_rate": section.learning_rate,
        "logging_steps": section.log_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if section.save_steps else "no",
        "save_steps": section.save_steps or 500,
        "save_total_limit": 2,
        "report_to": list(section.report_to) or "none",
        "seed": seed,
        "data_seed": seed,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if clash := sorted(set(ours) & set(section.trainer)):
        raise UserError(f"train.trainer.{clash[0]} is set by the recipe itself: see `learning_rate`, `save_steps` and others")
    try:
        return TrainingArguments(**(ours | section.trainer))
    except (TypeError, ValueError) as e:
        raise UserError(f"train.trainer: {' '.join(str(e).split())}") from None


def _means(sums: Counter[str], seconds: float) -> Metrics:
    """Averages over the steps since the last log."""
    means: Metrics = {"tokens_per_second": sums["tokens"] / seconds}
    if sums["ntp_count"]:
        means["ntp"] = sums["ntp_sum"] / sums["ntp_count"]
    if sums["nsp_count"]:
        means["nsp"] = sums["nsp_sum"] / sums["nsp_count"]
        means["accuracy"] = sums["nsp_right"] / sums["nsp_count"]
        means["candidates"] = sums["candidates"] / sums["steps"]
    return means


def _fits(example: Example, passages: Mapping[str, Passage], template: Template, limit: int) -> bool:
    """Whether the rendered example has at most `limit` tokens; short ones are not rendered to find out."""
    room = sum(len(part.claim.encode()) + template.settings.max_passage_tokens + 3 for part in example.evidence)
    if room + len(example.question.encode()) + 64 <= limit and len(example.evidence) == len(example.response):
        return True
    return len(template.render(example, passages).ids) <= limit


def _claim(run: Path, recipe: Recipe) -> None:
    """Makes the run folder this recipe's, or refuses one that is another's."""
    saved, text = run / "recipe.yaml", dump_recipe(recipe)
    if saved.is_file():
        if saved.read_text("utf-8") != text:
            raise UserError(f"{run} holds a run of another recipe; name another folder with --out, or start over with --fresh")
        return
    with atomic_file(run / "versions.json") as file:
        file.write((json.dumps(_versions(), indent=2) + "\n").encode())
    with atomic_file(saved) as file:
        file.write(text.encode())


def _versions() -> dict[str, str]:
    packages = ("cosup", "torch", "transformers", "accelerate", "numpy")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return {
        **{package: importlib.metadata.version(package) for package in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git_commit": commit.stdout.strip() or "unknown",
    }


def _last_checkpoint(run: Path) -> str | None:
    checkpoints = run / "checkpoints"
    return get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None


def _refuse_several_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "this version trains in one process, because candidates are not gathered over ranks yet: start it without "
            "torchrun or accelerate launch"
        )


def _summary(recipe: Recipe, model: CoSupModel, data: TrainingData) -> dict[str, str]:
    """What is shown before a run: what is trained, on what, for how long."""
    section = recipe.train
    millions = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    limits = [f"{section.epochs:g} epochs", section.max_steps and f"{section.max_steps:,} steps"]
    limits.append(section.max_minutes and f"{section.max_minutes:g} minutes")
    table = {
        "model": ", ".join(f"{name} {size:.0f}M" for name, size in millions.items()) + " parameters",
        "objective": section.objective + (f", lambda {section.lambda_:g}" if section.objective == "ntp+nsp" else ""),
        "examples": f"{len(data.examples):,} over {len(data.passages):,} passages, {section.batch_size} a step",
        "until": " or ".join(limit for limit in limits if limit),
        "computes in": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    if data.left_out:
        table["left out"] = ", ".join(f"{count:,} ({reason})" for reason, count in data.left_out.items())
    return table


def _card(recipe: Recipe, history: list[dict[str, Any]]) -> str:
    last = next((row for row in reversed(history) if "tokens_per_second" in row), {})
    figures = "\n".join(f"- {name}: {last[name]:.3f}" for name in ("ntp", "nsp", "accuracy") if name in last)
    return (
        f"# {recipe.name}\n\nA model of `cosup`: `gen/` writes and retrieves, `emb/` embeds passages.\n\n"
        f"Last logged, on training batches:\n\n{figures}\n\nRecipe:\n\n```yaml\n{dump_recipe(recipe)}```\n"
    )
