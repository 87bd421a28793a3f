"""Training throughput against the plain reading of the paper's code: same model, same examples, one run.

    python benchmarks/train.py [--quick] [--questions FILE --passages FILE]

A step is forward, backward, clipping and AdamW over the same 16 examples on either side; one side runs after the other,
each in a process of its own, because both at once need more than 24 GB. Real tokens
are those of Gen's sequences and of the cited passages, one a citation, so that both sides are credited with the same
number. Without --questions the built-in worldfacts are used.

Figures: `train_speedup`, ours in the type that this hardware multiplies in against plain in float32;
`train_speedup_same_dtype`, plain in our type.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import plain
import torch
from report import report

from cosup.config import ModelSection, TrainSection
from cosup.data import Example, Passage, read_passages, read_questions
from cosup.data.convert import convert
from cosup.data.worldfacts import worldfacts
from cosup.model import CoSupModel, compute_dtype
from cosup.train import MasterAdamW, collate, objective_loss
from cosup.train.layers import quicken

BATCH = 16


def main() -> None:
    arguments = parse()
    sides = ["cosup", "plain float32"]
    if compute_dtype("auto", "cpu") != torch.float32:
        sides.append("plain same dtype")
    tokens = alone(counted, arguments)
    seconds = {side: alone(measured, side, arguments) for side in sides}
    for name, times in seconds.items():
        rates = [n / t for n, t in zip(tokens[1:], times, strict=True)]
        print(f"{name:17} {statistics.median(rates):7.1f} real tokens/s (min {min(rates):.1f}, max {max(rates):.1f})")
    total = {name: sum(times) for name, times in seconds.items()}
    figures = {
        "train_speedup": total["plain float32"] / total["cosup"],
        "train_speedup_same_dtype": total.get("plain same dtype", total["plain float32"]) / total["cosup"],
        "tokens_per_second": sum(tokens[1:]) / total["cosup"],
        "plain_tokens_per_second": sum(tokens[1:]) / total["plain float32"],
    }
    report("train", figures, config_of(arguments))


def alone(work: Callable[..., Any], *given: Any) -> Any:
    """What a function returns in a process of its own, whose memory goes back to the system."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def counted(arguments: argparse.Namespace) -> list[int]:
    """Real tokens of each step."""
    examples, corpus = load(arguments)
    model = CoSupModel.start(ModelSection(gen=arguments.model))
    return [real_tokens(model, corpus, examples[i : i + BATCH]) for i in range(0, len(examples), BATCH)]


def measured(side: str, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each step of a side but the first."""
    examples, corpus = load(arguments)
    if side == "cosup":
        return timed(our_side(arguments.model, examples, corpus), steps=len(examples) // BATCH)
    dtype = torch.float32 if side == "plain float32" else compute_dtype("auto", "cpu")
    return timed(plain_side(arguments.model, examples, corpus, dtype), steps=len(examples) // BATCH)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 timed steps instead of 8")
    parser.add_argument("--questions", type=Path, help="JSONL of questions")
    parser.add_argument("--passages", type=Path, help="JSONL of the passages that they cite")
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    if (arguments.questions is None) != (arguments.passages is None):
        parser.error("--questions and --passages go together")
    return arguments


def load(arguments: argparse.Namespace) -> tuple[list[Example], dict[str, Passage]]:
    """As many examples as the run needs, the first of the file, and one batch to warm up."""
    if arguments.questions is None:
        facts = worldfacts()
        passages, questions = facts.passages, facts.train
    else:
        passages, questions = list(read_passages(arguments.passages)), list(read_questions(arguments.questions))
    corpus = {passage.id: passage for passage in passages}
    steps = 4 if arguments.quick else 9
    return list(islice(convert(questions, passages=corpus), steps * BATCH)), corpus


@dataclass
class Side:
    """A model, its optimiser, and the loss of a step by its number."""

    model: CoSupModel
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], torch.Tensor]


def our_side(name: str, examples: list[Example], corpus: dict[str, Passage]) -> Side:
    """Ours."""
    model = CoSupModel.start(ModelSection(gen=name))
    dtype = compute_dtype("auto", "cpu")
    model.to(dtype).train()
    quicken(model, "auto", device=model.device.type)
    optimizer = (torch.optim.AdamW if dtype == torch.float32 else MasterAdamW)(model.parameters(), lr=1e-5, fused=True)

    def loss(number: int) -> torch.Tensor:
        batch = collate(model.template, examples[number * BATCH : (number + 1) * BATCH], corpus, TrainSection())
        return objective_loss(model(batch), batch, objective="ntp+nsp", lambda_=1.0, temperature=0.05)[0]

    return Side(model, optimizer, loss)


def real_tokens(model: CoSupModel, corpus: dict[str, Passage], examples: list[Example]) -> int:
    """Tokens of Gen's sequences and of each citation's passage; padding is none."""
    template = model.template
    gen = sum(len(template.render(example, corpus).ids) for example in examples)
    cited = (corpus[part.passage] for example in examples for part in example.evidence)
    return gen + sum(len(template.embedded(p, max_tokens=template.settings.max_passage_tokens)) for p in cited)


def plain_side(name: str, examples: list[Example], corpus: dict[str, Passage], dtype: torch.dtype) -> Side:
    """`plain.py` on the same sequences."""
    model = CoSupModel.start(ModelSection(gen=name))
    template, pad = model.template, model.template.tokenizer.pad_token_id
    for part in (model.gen, model.emb):
        part.set_attn_implementation("sdpa")
    model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def loss(number: int) -> torch.Tensor:
        chosen = examples[number * BATCH : (number + 1) * BATCH]
        rendered = [template.render(example, corpus) for example in chosen]
        cited = [corpus[part.passage] for example in chosen for part in example.evidence]
        batch = plain.collate(
            [(row.ids, row.labels, row.ret) for row in rendered],
            [template.embedded(p, max_tokens=template.settings.max_passage_tokens) for p in cited],
            pad,
        )
        return plain.plain_loss(model.gen, model.emb, batch)

    return Side(model, optimizer, loss)


def step(side: Side, number: int) -> None:
    """Forward, backward, clipping and AdamW."""
    side.loss(number).backward()
    torch.nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
    side.optimizer.step()
    side.optimizer.zero_grad()


def timed(side: Side, *, steps: int) -> list[float]:
    """Seconds of each step but the first, which warms up."""
    seconds = []
    for number in range(steps):
        started = time.perf_counter()
        step(side, number)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "model": arguments.model,
        "batch": BATCH,
        "quick": arguments.quick,
        "questions": arguments.questions.name if arguments.questions else "worldfacts",
        "dtype": str(compute_dtype("auto", "cpu")),
    }


if __name__ == "__main__":
    main()
