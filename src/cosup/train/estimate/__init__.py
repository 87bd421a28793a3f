"""What a recipe will need, before it is run: peak memory of a process, seconds a step, minutes in all.

Memory is counted on the meta device, where models have shapes and no weights: what the forward pass of a real batch
keeps for the backward pass, in cut models, extrapolated to all layers. Time is measured on this machine: steps of cut
models with random weights, extrapolated likewise.
"""

from cosup.train.estimate.memory import Memory, expected_memory
from cosup.train.estimate.run import Estimate, estimate_run, expectations
from cosup.train.estimate.sample import Sample, first_batches

__all__ = [
    "Estimate",
    "Memory",
    "Sample",
    "estimate_run",
    "expectations",
    "expected_memory",
    "first_batches",
]
