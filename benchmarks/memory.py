"""Peak memory of a training step, over what is resident before it; each measurement in a fresh process.

    python benchmarks/memory.py [--quick] [--questions FILE --passages FILE]

Resident are weights, gradients and AdamW's moments. Figures: `train_memory_ratio`, ours against `plain.py` on the same
16 examples; `cached_memory_ratio`, a step with 1,024 candidates against one with 64, both in chunks of 16 (with --quick
256 against 64). Linux only: the peak is the kernel's VmHWM.
"""

import argparse
import subprocess
import sys
from itertools import islice
from pathlib import Path

import torch
from report import report
from train import BATCH, Side, config_of, load, our_side, parse, plain_side

from cosup.config import TrainSection
from cosup.data import Evidence, Example, Passage
from cosup.train import backward_in_chunks, collate

CHUNK = 16
SIDES = ("plain", "cosup", "few", "many")


def main() -> None:
    if "--side" in sys.argv:
        place = sys.argv.index("--side")
        side = sys.argv[place + 1]
        del sys.argv[place : place + 2]
        print(measured(side, parse()))
        return
    arguments = parse()
    peaks = {}
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[side] = int(done.stdout.split()[-1])
        print(f"{side:6} {peaks[side] / 1e9:6.2f} GB over the resident state", flush=True)
    figures = {
        "train_memory_ratio": peaks["cosup"] / peaks["plain"],
        "cached_memory_ratio": peaks["many"] / peaks["few"],
        **{f"{side}_gb": peak / 1e9 for side, peak in peaks.items()},
    }
    report("memory", figures, config_of(arguments))


def measured(side: str, arguments: argparse.Namespace) -> int:
    """Bytes that one forward and backward pass needs at its peak."""
    examples, corpus = load(arguments)
    count = {"few": 64, "many": 256 if arguments.quick else 1024}.get(side)
    if count is not None:
        examples = with_negatives(examples[:BATCH], corpus, count)
    measured_side = (
        plain_side(arguments.model, examples, corpus, torch.float32)
        if side == "plain"
        else our_side(arguments.model, examples, corpus)
    )
    for parameter in measured_side.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    measured_side.optimizer.step()  # the moments
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    if count is None:
        measured_side.loss(0).backward()
    else:
        in_chunks(measured_side, examples, corpus, count)
    return status("VmHWM") - before


def in_chunks(side: Side, examples: list[Example], corpus: dict[str, Passage], count: int) -> None:
    """The gradient of a step with so many candidates."""
    batch = collate(side.model.template, examples, corpus, TrainSection(negatives=count))
    assert len(batch["emb_lengths"]) == count
    backward_in_chunks(side.model, batch, size=CHUNK, objective="ntp+nsp", lambda_=1.0, temperature=0.05)


def with_negatives(examples: list[Example], corpus: dict[str, Passage], candidates: int) -> list[Example]:
    """The examples with negatives for so many distinct candidates in all."""
    golds = {example.evidence[0].passage for example in examples}
    others = iter(list(islice((id for id in corpus if id not in golds), candidates - len(golds))))
    share = -(-(candidates - len(golds)) // len(examples))
    changed = []
    for example in examples:
        part = example.evidence[0]
        negatives = tuple(islice(others, share))
        first = Evidence(part.passage, part.claim, also=part.also, negatives=negatives)
        changed.append(Example(example.id, example.task, example.question, (first,)))
    return changed


def status(name: str) -> int:
    """Bytes that the kernel says under this name."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
