"""What `cosup train --dry-run` expects against what a few really trained steps take.

    python benchmarks/dry_run.py RECIPE [--set KEY=VALUE ...] [--steps 6]

Two fresh processes, one after the other: one estimates, the other trains the recipe's first steps. The first step, in
which memory is asked for and nothing is warm, is not timed. Figures: seconds a step and peak memory, expected and
measured, and their ratios; 1 is exact.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import report

from cosup.config import Recipe, load_recipe
from cosup.train import estimate_run, train_recipe


def main() -> None:
    arguments = parse()
    if arguments.part:
        recipe = load_recipe(arguments.recipe, arguments.set)
        print(json.dumps({"expected": expected, "measured": measured}[arguments.part](recipe, arguments.steps)))
        return
    parts = {part: alone(part) for part in ("expected", "measured")}
    figures = {f"{part}_{name}": value for part, values in parts.items() for name, value in values.items()}
    for name in ("step_seconds", "peak_gb"):
        figures[f"{name}_ratio"] = parts["expected"][name] / parts["measured"][name]
    report("dry_run", figures, {"recipe": arguments.recipe.stem, "set": arguments.set, "steps": arguments.steps})


def alone(part: str) -> dict[str, float]:
    """The figures of one side, from a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(part, figures)
    return figures


def expected(recipe: Recipe, steps: int) -> dict[str, float]:
    start = time.perf_counter()
    found = estimate_run(recipe)
    assert found.step_seconds is not None, found.untimed
    seconds = time.perf_counter() - start
    return {"step_seconds": found.step_seconds, "peak_gb": found.memory.peak / 1e9, "estimating_seconds": seconds}


def measured(recipe: Recipe, steps: int) -> dict[str, float]:
    from transformers import TrainerCallback

    ends: list[float] = []
    peaks: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)

    train = recipe.train.model_copy(update={"max_steps": steps, "max_minutes": None})
    with tempfile.TemporaryDirectory() as folder:
        train_recipe(recipe.model_copy(update={"train": train}), Path(folder) / "run", callbacks=[Watch()])
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return {"step_seconds": statistics.fmean(seconds), "peak_gb": peaks[-1], "slowest": max(seconds)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--part", choices=("expected", "measured"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
