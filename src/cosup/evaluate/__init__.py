"""Judging a model and an index on questions: retrieval, answers, grounding, form, and the `ntp` loss."""

from cosup.evaluate.figures import LABELS, MORE_LABELS, NOT_RUN, Evaluation, Figure, label_of, summarize
from cosup.evaluate.judge import PassageTexts, Prediction, judge
from cosup.evaluate.model import evaluate_model, ntp_loss
from cosup.evaluate.nli import CachedNli, HuggingFaceNli, Nli
from cosup.evaluate.predict import MODES, Mode
from cosup.evaluate.run import RunSettings, evaluate_tasks, remove_run
from cosup.evaluate.tasks import HEADLINES, Task, read_tasks

__all__ = [
    "HEADLINES",
    "LABELS",
    "MODES",
    "MORE_LABELS",
    "NOT_RUN",
    "CachedNli",
    "Evaluation",
    "Figure",
    "HuggingFaceNli",
    "Mode",
    "Nli",
    "PassageTexts",
    "Prediction",
    "RunSettings",
    "Task",
    "evaluate_model",
    "evaluate_tasks",
    "judge",
    "label_of",
    "ntp_loss",
    "read_tasks",
    "remove_run",
    "summarize",
]
