"""Pure metric functions: answers, rankings, citations, and how sure a figure is."""

from cosup.metrics.answers import (
    answer_in,
    exact_match,
    found_in,
    normalize_answer,
    rouge_l,
    string_em,
    token_f1,
    verdict,
)
from cosup.metrics.citations import (
    CitationScores,
    Pair,
    Statement,
    citation_pairs,
    citation_scores,
    claim_recall,
)
from cosup.metrics.rankings import (
    best_r_precision,
    first_of_each,
    precision_at,
    r_precision,
    recall_at,
    reciprocal_rank,
    success_at,
)
from cosup.metrics.statistics import Difference, bootstrap_intervals, bootstrap_reduction, paired_difference

__all__ = [
    "CitationScores",
    "Difference",
    "Pair",
    "Statement",
    "answer_in",
    "best_r_precision",
    "bootstrap_intervals",
    "bootstrap_reduction",
    "citation_pairs",
    "citation_scores",
    "claim_recall",
    "exact_match",
    "first_of_each",
    "found_in",
    "normalize_answer",
    "paired_difference",
    "precision_at",
    "r_precision",
    "recall_at",
    "reciprocal_rank",
    "rouge_l",
    "string_em",
    "success_at",
    "token_f1",
    "verdict",
]
