"""A transformers.Trainer with both losses, and the callbacks of a run."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cosup import losses
from cosup.config import Objective, TrainSection, UserError
from cosup.data import Example
from cosup.files import atomic_file
from cosup.model import Batch, CoSupModel, Output
from cosup.train.collate import Collator
from cosup.train.optimizer import MasterAdamW

Metrics = dict[str, float]


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
        sampler: in which order.
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
        sampler: Sampler[int],
        collator: Collator,
        section: TrainSection,
        folder: Path,
        seed: int,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.section, self._sampler = section, sampler
        self.clock = Clock(section)
        self._sums: Counter[str] = Counter()
        self._since = time.perf_counter()
        super().__init__(
            model=model,
            args=_arguments(section, folder, seed),
            train_dataset=examples,
            data_collator=collator,  # type: ignore[arg-type]  # a Batch is a dict
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
            logs["progress"] = round(self.clock.progress(self.state.global_step, self.state.max_steps), 4)
        logs["minutes"] = round(self.clock.minutes(), 3)
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._sampler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over everything that is trained; weight decay, if any, on matrices only."""
        if self.optimizer is None:
            assert self.model is not None
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
                optimizer or self.create_optimizer(), lambda step: rate(self.clock.progress(step, num_training_steps))
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # save_model knows that the embedding and the head are one matrix; the Trainer's own way refuses it
        assert output_dir is not None
        assert self.model is not None
        folder = Path(output_dir)
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
        raise UserError(
            f"train.trainer.{clash[0]} is set by the recipe itself: see `learning_rate`, `save_steps` and others"
        )
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
