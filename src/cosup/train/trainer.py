"""A transformers.Trainer with both losses, and the callbacks of a run."""

import importlib.util
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer import SCHEDULER_NAME

from cosup.config import TrainSection, UserError
from cosup.files import atomic_file
from cosup.losses import several_processes
from cosup.model import Batch, CoSupModel, tokens_of
from cosup.train.checkpoints import UNFINISHED, finish_checkpoint, load_trained, newest_checkpoint, save_trained
from cosup.train.collate import Collator
from cosup.train.optimizer import adamw
from cosup.train.rows import Row
from cosup.train.step import Metrics, backward_in_chunks, objective_loss

logger = logging.getLogger(__name__)

# fields of TrainingArguments that we leave without effect, or that break our step, by the key of ours that does it
_REFUSED = {
    field: key
    for key, fields in {
        "weight_decay": "weight_decay",
        "schedule": "lr_scheduler_type lr_scheduler_kwargs",
        "warmup": "warmup_steps warmup_ratio",
        "dtype": "fp16 bf16_full_eval fp16_full_eval",
        "compile": "torch_compile torch_compile_backend torch_compile_mode",
        "activation_checkpointing": "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing "
        "gradient_checkpointing_kwargs",
        "chunk_size": "auto_find_batch_size",
        "neighbours": "train_sampling_strategy length_column_name",
        "eval_steps": "load_best_model_at_end greater_is_better do_eval",
        "": "optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon label_smoothing_factor "
        "neftune_noise_alpha use_liger_kernel liger_kernel_config use_cache average_tokens_across_devices label_names "
        "prediction_loss_only eval_accumulation_steps eval_do_concat_batches eval_use_gather_object "
        "include_for_metrics batch_eval_metrics do_train do_predict resume_from_checkpoint push_to_hub hub_model_id "
        "hub_token hub_strategy hub_private_repo hub_always_push hub_revision",
    }.items()
    for field in fields.split()
}


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
        dev: what the model is judged by during training.
        callbacks: of transformers.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: CoSupModel,
        *,
        examples: Dataset[Row],
        sampler: Sampler[int],
        collator: Collator,
        section: TrainSection,
        folder: Path,
        seed: int,
        dev: Dataset[Row] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        self.section, self._sampler = section, sampler
        self.clock = Clock(section)
        self._sums: Counter[str] = Counter()
        self._since = 0.0
        self._ids: list[str] = []
        self._norms: Metrics = {}
        super().__init__(
            model=model,
            args=_arguments(section, folder, seed, examples=len(examples)),  # type: ignore[arg-type]
            train_dataset=examples,
            eval_dataset=dev,
            data_collator=collator,  # type: ignore[arg-type]  # a Batch is a dict
            callbacks=[*callbacks, self.clock],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers, and takes back the weights that did best on the dev set; theirs forgets them on resuming."""
        self._since = time.perf_counter()
        output = super().train(*args, **kwargs)
        best = self._best_checkpoint()
        if best is not None and not best.is_dir():
            logger.warning("%s, which did best on the dev set, is gone; the last weights are kept", best)
        elif best is not None:
            self._load_from_checkpoint(str(best))
        return output

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of a step; in chunks where the recipe says so."""
        self._ids = inputs["example_ids"]
        if self.section.chunk_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss, metrics = backward_in_chunks(
                model,
                inputs,
                size=self.section.chunk_size,
                backward=self.accelerator.backward,
                **self._objective(model),
            )
        self._note(loss, metrics, inputs)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The step's loss, whose parts are kept for the log. Raises UserError if it is not finite."""
        output = model(inputs)
        loss, metrics = objective_loss(output, inputs, **self._objective(model))
        self._note(loss, metrics, inputs)
        return (loss, output) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Losses and in-batch accuracy on the dev set, batch by batch as in training."""
        assert self.model is not None
        self.model.eval()
        sums: Counter[str] = Counter()
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                inputs: Any = self._prepare_inputs(batch)
                sums.update(objective_loss(self.model(inputs), inputs, **self._objective(self.model))[1])
        means = _means(_over_processes(sums))
        lambda_ = self.section.lambda_ if self.section.objective == "ntp+nsp" else 1.0
        means["loss"] = means.get("ntp", 0.0) + lambda_ * means.get("nsp", 0.0)
        figures = {f"eval_{name}": value for name, value in means.items() if name != "candidates"}
        super().log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds losses, in-batch accuracy, candidates, gradient norms and real tokens/s to the Trainer's log."""
        if self._sums["steps"]:
            sums = _over_processes(self._sums)
            logs |= _means(sums) | self._norms
            logs["tokens_per_second"] = sums["tokens"] / (time.perf_counter() - self._since)
            self._sums.clear()
            self._since = time.perf_counter()
            logs["progress"] = round(self.clock.progress(self.state.global_step, self.state.max_steps), 4)
        logs["minutes"] = round(self.clock.minutes(), 3)
        super().log(logs, start_time)

    def _objective(self, model: Any) -> dict[str, Any]:
        return {
            "objective": self.section.objective,
            "lambda_": self.section.lambda_,
            "temperature": self.accelerator.unwrap_model(model).settings.temperature,
        }

    def _note(self, loss: Tensor, metrics: Metrics, inputs: Batch) -> None:
        if not torch.isfinite(loss):
            raise self._stopped(f"the loss became {loss.item()}")
        self._sums.update(metrics)
        self._sums["steps"] += 1
        self._sums["tokens"] += tokens_of(inputs)

    def _stopped(self, what: str) -> UserError:
        good = newest_checkpoint(Path(str(self.args.output_dir)))
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet, see train.save_steps"
        return UserError(
            f"{what} at step {self.state.global_step + 1} (examples {', '.join(self._ids)}); {kept}: lower "
            "train.learning_rate, or check these examples"
        )

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clips, and keeps the norms of Gen and Emb_seq apart for the log."""
        inner = self.accelerator.unwrap_model(model)
        of_gen = {id(p) for p in inner.gen.parameters()}
        parts: dict[str, list[Any]] = {"gen": [], "emb": []}
        for parameter in inner.parameters():
            if parameter.grad is not None:
                parts["gen" if id(parameter) in of_gen else "emb"].append(parameter)
        norms = {name: _norm(parameters) for name, parameters in parts.items() if parameters}
        total: Tensor = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        if not torch.isfinite(total):
            raise self._stopped(f"the gradient's norm became {total.item()}")
        for name, parameters in parts.items():
            if parameters:
                limit_on = norms[name] if self.section.objective == "separate" else total
                torch.nn.utils.clip_grads_with_norm_(parameters, self.section.max_grad_norm, limit_on)
        self._norms = {f"grad_norm_{name}": float(norm) for name, norm in norms.items()}
        return total

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._sampler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over everything that is trained; weight decay, if any, on matrices only."""
        if self.optimizer is None:
            assert self.model is not None
            self.optimizer = adamw([p for p in self.model.parameters() if p.requires_grad], self.section)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A rate that follows the run's progress in steps or in minutes, whichever is further."""
        if self.lr_scheduler is None:
            assert self.train_dataset is not None
            steps_per_epoch = math.ceil(len(self.train_dataset) / self.section.batch_size)  # type: ignore[arg-type]
            rate = rate_at(self.section, epochs=num_training_steps / steps_per_epoch)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.create_optimizer(), lambda step: rate(self.clock.progress(step, num_training_steps))
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained weights; under FSDP2 each process its own shard, where the Trainer would gather them."""
        # the Trainer's own way refuses an embedding and a head that are one matrix, too
        if self.is_fsdp_enabled or self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_trained(self.accelerator.unwrap_model(self.model), folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # the Trainer's own way writes all weights once more
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint to the side, and renames it when all of it is there."""
        folder = Path(str(self.args.output_dir))
        with self._output_folder(folder / UNFINISHED):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(folder, self.state.global_step, best=self._best_checkpoint())
        self.accelerator.wait_for_everyone()

    def _best_checkpoint(self) -> Path | None:
        step = self.state.best_global_step
        return Path(str(self.args.output_dir)) / f"checkpoint-{step}" if step else None

    @contextmanager
    def _output_folder(self, folder: Path) -> Iterator[None]:
        usual, self.args.output_dir = self.args.output_dir, str(folder)
        try:
            yield
        finally:
            self.args.output_dir = usual


class Clock(TrainerCallback):
    """Time spent training, over all sittings of a run, and the end of a run that has a budget in minutes."""

    def __init__(self, section: TrainSection):
        self._budget = section.max_minutes
        self._before = self._now = 0.0
        self._started: float | None = None

    def minutes(self) -> float:
        """Minutes of training so far."""
        return self._before + ((time.perf_counter() - self._started) / 60 if self._started is not None else 0.0)

    def _agree(self) -> None:
        """Takes the first process's time, so that all of them have one rate and stop together."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        minutes = torch.tensor(self.minutes(), dtype=torch.double, device=device)
        if several_processes():
            torch.distributed.broadcast(minutes, src=0)
        self._now = float(minutes)

    def progress(self, step: int, steps: int) -> float:
        """Share of the run that is done, 0 to 1, by steps or by minutes."""
        by_time = self._now / self._budget if self._budget else 0.0
        return min(1.0, max(step / max(steps, 1), by_time))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Goes on from the minutes that a checkpoint tells of."""
        logged = [row["minutes"] for row in state.log_history if "minutes" in row]
        self._before = logged[-1] if logged else 0.0
        self._started = time.perf_counter()
        self._agree()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fixes the time that the step's learning rate follows from."""
        if self._budget:
            self._agree()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends the run when the budget is spent; its last step is judged, and saved, where there is a dev set."""
        if self._budget and self._now >= self._budget:
            control.should_training_stop = True
            control.should_log = True
            if args.eval_strategy == "steps":
                control.should_evaluate = control.should_save = True


class MetricsFile(TrainerCallback):
    """Appends each log to a JSONL file; lines after the checkpoint that a run goes on from are dropped."""

    def __init__(self, path: Path):
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keeps the whole lines up to the step that the run starts at."""
        if not state.is_world_process_zero:
            return
        lines = self._path.read_text("utf-8").splitlines() if self._path.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= state.global_step]
        with atomic_file(self._path) as file:
            file.write("".join(line + "\n" for line in kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One line a log."""
        if state.is_world_process_zero and logs:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def rate_at(section: TrainSection, *, epochs: float = 1.0) -> Callable[[float], float]:
    """The factor of the learning rate at a progress from 0 to 1: a linear rise, then the schedule.

    Args:
        section: the recipe's `train`.
        epochs: how many the whole run has, for `schedule: epoch`.
    """

    def rate(progress: float) -> float:
        if progress < section.warmup:
            return max(progress / section.warmup, 0.01)
        rest = (progress - section.warmup) / (1 - section.warmup)
        return {
            "linear": 1 - rest,
            "cosine": (1 + math.cos(math.pi * rest)) / 2,
            "constant": 1.0,
            # an epoch's last step may come out a hair short of its end
            "epoch": section.epoch_decay ** math.floor(progress * epochs + 1e-9),
        }[section.schedule]

    return rate


def _arguments(section: TrainSection, folder: Path, seed: int, *, examples: int) -> TrainingArguments:
    share = _share_of_batch(section)
    ours: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": share,
        "per_device_eval_batch_size": share,
        "eval_strategy": "steps" if section.eval_steps else "no",
        "eval_steps": section.eval_steps or None,
        "metric_for_best_model": "eval_loss" if section.eval_steps else None,
        "num_train_epochs": section.epochs,
        "max_steps": section.steps(examples),
        "max_grad_norm": section.max_grad_norm,
        "learning_rate": section.learning_rate,
        "logging_steps": section.log_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if section.save_steps or section.eval_steps else "no",
        "save_steps": section.save_steps or section.eval_steps or 500,
        "save_total_limit": None,  # checkpoints.py keeps count
        "report_to": list(section.report_to) or "none",
        "seed": seed,
        "data_seed": seed,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    if clash := sorted(set(ours) & set(section.trainer)):
        raise UserError(
            f"train.trainer.{clash[0]} is set by the recipe itself: see `learning_rate`, `save_steps` and others"
        )
    for field in sorted(set(_REFUSED) & set(section.trainer)):
        instead = f"set train.{_REFUSED[field]} instead" if _REFUSED[field] else "leave it out"
        raise UserError(f"train.trainer.{field} has no effect here: {instead}")
    try:
        arguments = TrainingArguments(**(ours | section.trainer))
    except (TypeError, ValueError) as e:
        raise UserError(f"train.trainer: {' '.join(str(e).split())}") from None
    for tracker in section.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"train.report_to names {tracker!r}, and transformers reports to {known}")
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"train.report_to names {tracker}, which is not installed: run `pip install {tracker}`")
    if arguments.n_gpu > 1:  # transformers would wrap the model in DataParallel, which splits the candidates
        logger.warning("%d GPUs are idle: one process trains on one; see recipes/accelerate", arguments.n_gpu - 1)
        arguments._n_gpu = 1
    return arguments


def _share_of_batch(section: TrainSection) -> int:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if section.batch_size % world:
        raise UserError(
            f"train.batch_size is {section.batch_size}, which {world} processes can't share equally: set a multiple of "
            f"{world}"
        )
    return section.batch_size // world


def _norm(parameters: list[Any]) -> Tensor:
    """The norm of gradients, whole or sharded, in float32 at least: bfloat16 would keep eight bits of it."""
    gradients = [p.grad for p in parameters]
    accurate = torch.promote_types(gradients[0].dtype, torch.float32)
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        sharded: Any = torch.stack([torch.linalg.vector_norm(gradient, dtype=accurate) for gradient in gradients])
        whole: Tensor = torch.linalg.vector_norm(sharded).full_tensor()
        return whole
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, accurate)))
    return norm


def _over_processes(sums: Counter[str]) -> Counter[str]:
    """The sums of all processes added up; what every process counts alike is averaged."""
    if not several_processes():
        return sums
    names = sorted({"steps", "tokens", "ntp_sum", "ntp_count", "nsp_sum", "nsp_count", "nsp_right", "candidates"})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.tensor([sums[name] for name in names], dtype=torch.double, device=device)
    torch.distributed.all_reduce(values)
    total = Counter(dict(zip(names, values.tolist(), strict=True)))
    for name in ("steps", "candidates"):
        total[name] = sums[name]
    return total


def _means(sums: Counter[str]) -> Metrics:
    """Averages over the steps summed up."""
    means: Metrics = {}
    if sums["ntp_count"]:
        means["ntp"] = sums["ntp_sum"] / sums["ntp_count"]
    if sums["nsp_count"]:
        means["nsp"] = sums["nsp_sum"] / sums["nsp_count"]
        means["accuracy"] = sums["nsp_right"] / sums["nsp_count"]
        means["candidates"] = sums["candidates"] / max(sums["steps"], 1)
    return means
