"""Training on a GPU, in bfloat16: real tokens per second, model FLOP utilisation, peak memory.

    python benchmarks/train_gpu.py [--models HuggingFaceTB/SmolLM2-135M-Instruct TinyLlama/TinyLlama-1.1B-...]
                                   [--batch 64] [--steps 8] [--device cuda]

Models have the shapes of those named, and random weights; data are random ids with the lengths of SQuAD examples. The
sides are `cosup` (ntp+nsp), `gen` and `emb` (the two forward-backward passes of which co-supervision consists, each
alone), `plain` (`plain.py` in bfloat16) and `trainer` (`transformers.Trainer` doing ntp alone on padded batches).

Figures, for each model: of each side real tokens per second and peak memory; `utilisation`, the operations that the
real tokens and labels of `cosup` need, against those of a large product of matrices on the same device; `cost_of_both`,
seconds of a step of `cosup` against those of `gen` and `emb` together, optimisers included; `speedup_vs_plain`. Without
a GPU it says that nothing was run.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import plain
import torch
from report import report
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from cosup.config import ModelSection, TrainSection
from cosup.model import CoSupModel, sketch
from cosup.model.lms import body_of
from cosup.template import IGNORED
from cosup.train import Collator, MasterAdamW, objective_loss
from cosup.train.estimate.sketches import moved_to
from cosup.train.rows import Row

MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T")
EXAMPLE, PASSAGE, CLAIM = (120, 360), (90, 256), (10, 40)  # tokens, shortest and longest
PAD = 2
WARM_UP = 2  # steps that are not timed
Steps = list[list[Row]]
Passages = Mapping[int, list[int]]


def main() -> None:
    arguments = parse()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("not run: there is no GPU here")
        return
    ceiling = product_rate(arguments.device)
    figures = {"product_tflops": ceiling / 1e12}
    for name in arguments.models:
        print(name)
        found = measured(name, arguments, ceiling)
        figures |= {f"{name.rpartition('/')[2]} {figure}": value for figure, value in found.items()}
        for figure, value in found.items():
            print(f"  {figure:32} {value:12.4g}")
    config = {"models": arguments.models, "batch": arguments.batch, "steps": arguments.steps, "dtype": "bfloat16"}
    gpu = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else None
    report("train_gpu", figures, config | {"device": gpu or arguments.device})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="whose shapes")
    parser.add_argument("--batch", type=int, default=64, help="examples a step")
    parser.add_argument("--steps", type=int, default=8, help="timed, after those that warm up")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def measured(name: str, arguments: argparse.Namespace, ceiling: float) -> dict[str, float]:
    """The figures of one model."""
    section, device = ModelSection(gen=name), arguments.device
    shapes = sketch(section)
    steps, passages = made_up(shapes.gen.config.vocab_size, count=arguments.steps + WARM_UP, batch=arguments.batch)
    rows = [row for step in steps[WARM_UP:] for row in step]
    of_gen, of_emb = sum(len(row.ids) for row in rows), sum(len(passages[row.gold[0]]) for row in rows)
    tokens = {"gen": of_gen, "trainer": of_gen, "emb": of_emb}
    seconds, figures = {}, {}
    for label, side in SIDES.items():
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        model = sketch(section, device=device).to(torch.bfloat16).train()
        seconds[label] = sum(list(side(model, steps, passages, device))[WARM_UP:])
        figures[f"{label}_tokens_per_second"] = tokens.get(label, of_gen + of_emb) / seconds[label]
        if device.startswith("cuda"):
            figures[f"{label}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        del model
    return figures | {
        "utilisation": operations(shapes, rows, passages) / seconds["cosup"] / ceiling,
        "cost_of_both": seconds["cosup"] / (seconds["gen"] + seconds["emb"]),
        "speedup_vs_plain": seconds["plain"] / seconds["cosup"],
    }


def made_up(vocabulary: int, *, count: int, batch: int) -> tuple[Steps, Passages]:
    """Steps of examples that each cite one passage of their own, and the passages, of random ids."""
    rng = random.Random(0)

    def ids(span: tuple[int, int]) -> list[int]:
        return [rng.randrange(PAD + 1, vocabulary - 3) for _ in range(rng.randint(*span))]

    passages = {key: ids(PASSAGE) for key in range(count * batch)}

    def row(key: int) -> Row:
        example, claim = ids(EXAMPLE), rng.randint(*CLAIM)
        labels = [IGNORED] * (len(example) - claim) + example[-claim:]
        return Row(str(key), key, example, labels, [len(example) - claim], [key], [[]], [[]])

    return [[row(key) for key in range(start, start + batch)] for start in range(0, count * batch, batch)], passages


def cosup(model: CoSupModel, steps: Steps, passages: Passages, device: str) -> Iterator[float]:
    """Seconds of each step with both losses."""
    collator = Collator(passages, TrainSection())

    def loss(rows: list[Row]) -> Tensor:
        batch = moved_to(collator(rows), device)
        return objective_loss(model(batch), batch, objective="ntp+nsp", lambda_=1.0, temperature=0.05)[0]

    return timed(loss, MasterAdamW(model.parameters(), lr=1e-5, fused=True), steps, device)


def gen(model: CoSupModel, steps: Steps, passages: Passages, device: str) -> Iterator[float]:
    """Seconds of each step with ntp alone, of Gen alone."""
    collator = Collator(passages, TrainSection(objective="ntp"))

    def loss(rows: list[Row]) -> Tensor:
        batch = moved_to(collator(rows), device)
        return objective_loss(model(batch), batch, objective="ntp", lambda_=1.0, temperature=0.05)[0]

    return timed(loss, MasterAdamW(model.gen.parameters(), lr=1e-5, fused=True), steps, device)


def emb(model: CoSupModel, steps: Steps, passages: Passages, device: str) -> Iterator[float]:
    """Seconds of each step of Emb_seq alone: Gen reads one token, and any function of the vectors is the loss."""
    collator = Collator(passages, TrainSection(objective="nsp"))

    def loss(rows: list[Row]) -> Tensor:
        batch = collator(rows)
        batch["gen_ids"], batch["gen_lengths"] = batch["gen_ids"][:1], [1]
        batch["ret_positions"] = torch.zeros(1, dtype=torch.long)
        return model(moved_to(batch, device)).candidates_ND.square().sum()

    return timed(loss, MasterAdamW(model.emb.parameters(), lr=1e-5, fused=True), steps, device)


def plainly(model: CoSupModel, steps: Steps, passages: Passages, device: str) -> Iterator[float]:
    """Seconds of each step of `plain.py`."""
    for part in (model.gen, model.emb):
        part.set_attn_implementation("sdpa")

    def loss(rows: list[Row]) -> Tensor:
        with torch.device(device):
            told = [(row.ids, row.labels, row.ret) for row in rows]
            return plain.plain_loss(model.gen, model.emb, plain.collate(told, [passages[r.gold[0]] for r in rows], PAD))

    return timed(loss, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), steps, device)


def trainer(model: CoSupModel, steps: Steps, passages: Passages, device: str) -> Iterator[float]:
    """Seconds of each step of `transformers.Trainer` on Gen, as its documentation has it."""
    del passages
    model.gen.set_attn_implementation("sdpa")
    clock = _Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=len(steps[0]),
            max_steps=len(steps),
            bf16=False,  # the weights already are
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            remove_unused_columns=False,
        )
        rows = [row for step in steps for row in step]
        Trainer(model.gen, arguments, train_dataset=rows, data_collator=padded, callbacks=[clock]).train()
    return iter(clock.seconds)


class _Clock(TrainerCallback):
    def __init__(self, device: str):
        self.seconds: list[float] = []
        self._device, self._started = device, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = now(self._device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(now(self._device) - self._started)


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A padded batch, as any collator of transformers makes it."""
    longest = max(len(row.ids) for row in rows)
    return {
        "input_ids": torch.tensor([row.ids + [PAD] * (longest - len(row.ids)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows]),
        "labels": torch.tensor([row.labels + [IGNORED] * (longest - len(row.ids)) for row in rows]),
    }


SIDES = {"cosup": cosup, "gen": gen, "emb": emb, "plain": plainly, "trainer": trainer}


def timed(
    loss: Callable[[list[Row]], Tensor], optimizer: torch.optim.Optimizer, steps: Steps, device: str
) -> Iterator[float]:
    """Seconds of forward, backward, clipping and the optimiser's step, for each step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for rows in steps:
        started = now(device)
        loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield now(device) - started


def now(device: str) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def operations(model: CoSupModel, rows: Sequence[Row], passages: Passages) -> float:
    """Floating-point operations of forward and backward over real tokens, with the head at labels only."""
    config = model.gen.config
    attended = config.num_hidden_layers * config.hidden_size
    sequences = [(body_of(model.gen), len(row.ids)) for row in rows]
    sequences += [(body_of(model.emb), len(passages[row.gold[0]])) for row in rows]
    weights = {
        id(body): sum(m.weight.numel() for m in body.modules() if isinstance(m, nn.Linear)) for body, _ in sequences
    }
    forward = sum(2 * weights[id(body)] * n + 2 * attended * n * n for body, n in sequences)
    labels = sum(label != IGNORED for row in rows for label in row.labels)
    return 3.0 * (forward + 2 * labels * config.hidden_size * config.vocab_size)


def product_rate(device: str) -> float:
    """Floating-point operations per second of a large product of matrices."""
    size = 8192 if device.startswith("cuda") else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(12):
        started = now(device)
        left @ right
        seconds.append(now(device) - started)
    return 2.0 * size**3 / statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
