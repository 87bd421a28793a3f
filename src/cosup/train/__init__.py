"""Co-supervised training: batches, a transformers.Trainer with both losses, and a run from a recipe."""

from cosup.train.checkpoints import checkpoints_in
from cosup.train.collate import Collator, NeighbourSampler, collate
from cosup.train.estimate import Estimate, estimate_run
from cosup.train.export import export_model, is_checkpoint
from cosup.train.optimizer import MasterAdamW
from cosup.train.run import plot_curves, remove_run, start_model, train_recipe
from cosup.train.step import Weights, backward_in_chunks, objective_loss
from cosup.train.tokenized import load_data
from cosup.train.trainer import CoSupTrainer, rate_at

__all__ = [
    "CoSupTrainer",
    "Collator",
    "Estimate",
    "MasterAdamW",
    "NeighbourSampler",
    "Weights",
    "backward_in_chunks",
    "checkpoints_in",
    "collate",
    "estimate_run",
    "export_model",
    "is_checkpoint",
    "load_data",
    "objective_loss",
    "plot_curves",
    "rate_at",
    "remove_run",
    "start_model",
    "train_recipe",
]
