"""Figures: what was measured over the questions of a task, how many there were, and how sure it is."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cosup import metrics
from cosup.files import atomic_file, atomic_folder

Item = dict[str, Any]
"""One question's outcome; `scores` holds the judgements on it, by metric."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value and how many questions (tokens, for `ntp`) it was measured on; None where there were none.

    Args:
        value: the mean over questions where nothing else is said.
        count: of questions.
        low, high: 95 % bootstrap interval over questions; None where there is none.
    """

    value: float | None
    count: int
    low: float | None = field(default=None, compare=False)
    high: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found.

    Args:
        figures: by name; see `LABELS` and `MORE_LABELS`.
        items: for each question, what was retrieved and answered, and the judgement on it.
    """

    figures: dict[str, Figure]
    items: list[Item]

    def save(self, folder: Path) -> None:
        """Writes `figures.json` and `items.jsonl`, whole or not at all, in the place of an earlier evaluation."""
        with atomic_folder(folder, marker="figures.json") as new:
            self.write_into(new)

    def write_into(self, folder: Path) -> None:
        """Writes the two files beside others that the folder holds."""
        with atomic_file(folder / "items.jsonl") as file:
            file.writelines(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in self.items)
        figures = {name: asdict(figure) for name, figure in self.figures.items()}
        with atomic_file(folder / "figures.json") as file:
            file.write((json.dumps(figures, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "Evaluation":
        """What `save` wrote."""
        figures = json.loads((folder / "figures.json").read_text("utf-8"))
        with (folder / "items.jsonl").open(encoding="utf-8") as file:
            items = [json.loads(line) for line in file]
        return cls({name: Figure(**figure) for name, figure in figures.items()}, items)


LABELS = {
    "forced_success@1": "retrieval success@1, forced",
    "forced_success@5": "retrieval success@5, forced",
    "free_success@1": "retrieval success@1, free",
    "free_success@5": "retrieval success@5, free",
    "bm25_success@1": "BM25 success@1",
    "bm25_success@5": "BM25 success@5",
    "answer_accuracy": "answer accuracy (a gold answer stands in the claims)",
    "exact_match": "exact match of the last claim",
    "token_f1": "token F1 of the last claim",
    "claim_words": "median words in a claim",
    "well_formed": "share of well-formed outputs",
    "cites": "share of outputs that cite",
    "ntp": "ntp loss (nats per token)",
}
"""The figures of the short table; an evaluation has all of them, with value None where nothing could be judged."""

_WAYS = {"forced": "forced", "free": "free", "bm25": "BM25"}
_RANKINGS = {
    "success@1": "success@1",
    "success@5": "success@5",
    "success@20": "success@20",
    "recall@5": "recall@5",
    "recall@20": "recall@20",
    "precision@1": "precision@1",
    "precision@5": "precision@5",
    "r_precision": "R-precision",
    "mrr": "MRR",
}
_BY = {"": "by passage", "page_": "by page", "answer_": "by answer presence"}

MORE_LABELS = {
    **{
        f"{way}_{by}{name}": f"retrieval {label}, {said}, {by_what}"
        for by, by_what in _BY.items()
        for way, said in _WAYS.items()
        for name, label in _RANKINGS.items()
    },
    "cited_precision": "share of the cited passages that are gold",
    "cited_recall": "share of the gold passages that are cited",
    "answer_in_text": "answer presence in the whole answer",
    "exact_match_text": "exact match of the whole answer",
    "token_f1_text": "token F1 of the whole answer (WoW: unigram F1)",
    "rouge_l": "ROUGE-L of the whole answer",
    "label_accuracy": "accuracy of the verdict",
    "string_em": "string EM (ASQA: share of readings answered)",
    "string_em_hit": "string EM hit (ASQA: all readings answered)",
    "claim_recall": "claim recall (NLI)",
    "citation_recall": "citation recall (NLI)",
    "citation_precision": "citation precision (NLI)",
    "grounded_claims": "share of claims whose answer stands in the cited passage",
    "answer_in_text_retrieved": "answer presence, counted only if a passage that was read holds the answer",
    "reduction_rate": "reduction rate (reliance on parametric knowledge)",
    "failed": "share of questions that failed",
    "mauve": "MAUVE",
}
"""The other figures. They are absent where nothing could be judged, as without an NLI model."""

NOT_RUN = {
    "citation_recall": "no NLI model was named",
    "citation_precision": "no NLI model was named",
    "claim_recall": "no NLI model was named",
    "mauve": "no model was named for MAUVE",
}
"""Figures that need another model, and why they are absent without it."""


def label_of(name: str) -> str:
    """What a figure is called; the part of a set that it is about, as in `label_accuracy[SUPPORTS]`, follows."""
    base, bracket, part = name.partition("[")
    label = LABELS.get(base) or MORE_LABELS.get(base) or base
    return f"{label}: {part.removesuffix(']')}" if bracket else label


def summarize(items: Sequence[Item]) -> dict[str, Figure]:
    """The figures of judged questions: means with intervals, and those that are no means.

    Args:
        items: all questions that were asked; one that has no reference for a metric lacks it and isn't counted there.
    """
    names = list(dict.fromkeys(name for item in items for name in item["scores"]))
    values_QM = np.array([[item["scores"].get(name, np.nan) for name in names] for item in items], np.float64)
    values_QM = values_QM.reshape(len(items), len(names))
    bounds_M2 = metrics.bootstrap_intervals(values_QM)
    figures = {}
    for column, name in enumerate(names):
        known = values_QM[~np.isnan(values_QM[:, column]), column]
        figures[name] = Figure(float(known.mean()), len(known), *_bounds(*bounds_M2[column]))
    figures["claim_words"] = _claim_words(items)
    if "answer_in_text_retrieved" in figures:
        figures["reduction_rate"] = _reduction_rate(items)
    order = [*LABELS, *(name for name in (*MORE_LABELS, *figures) if name not in LABELS)]
    return {name: figures.get(name, Figure(None, 0)) for name in dict.fromkeys(order) if name in {**LABELS, **figures}}


def _claim_words(items: Sequence[Item]) -> Figure:
    lengths = [len(claim.split()) for item in items for claim in item["claims"]]
    return Figure(statistics.median(lengths) if lengths else None, len(lengths))


def _reduction_rate(items: Sequence[Item]) -> Figure:
    """How much of the correctness rests on no passage: Figure 3 of the paper."""
    scores = [item["scores"] for item in items if "answer_in_text_retrieved" in item["scores"]]
    whole = np.array([score["answer_in_text"] for score in scores])
    part = np.array([score["answer_in_text_retrieved"] for score in scores])
    if not whole.sum():
        return Figure(None, len(scores))
    interval = metrics.bootstrap_reduction(whole, part)
    return Figure(float(1 - part.sum() / whole.sum()), len(scores), *_bounds(*interval))


def _bounds(low: float, high: float) -> tuple[float | None, float | None]:
    bounds = float(low), float(high)
    return (None, None) if any(math.isnan(bound) for bound in bounds) else bounds
