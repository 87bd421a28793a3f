"""The tables of a report, once as Markdown and once as HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from cosup import metrics
from cosup.evaluate import HEADLINES, NOT_RUN, Figure, label_of
from cosup.evaluate.tasks import Headline
from cosup.report.load import Condition

COMPARED = (
    "forced_success@1",
    "free_success@1",
    "free_page_r_precision",
    "free_answer_success@1",
    "answer_accuracy",
    "answer_in_text",
    "exact_match_text",
    "token_f1_text",
    "rouge_l",
    "label_accuracy",
    "string_em",
    "claim_recall",
    "citation_recall",
    "citation_precision",
    "grounded_claims",
    "well_formed",
)
"""The figures in which conditions are tested against the first one."""


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, a note, the names of the columns, and rows of cells whose first one names the row."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown."""
        cells = [self.columns, ["---", *["--:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join("| " + " | ".join(_bare(cell) for cell in row) + " |" for row in cells)
        return f"## {self.title}\n\n{self.note}\n\n{body}\n"

    def html(self) -> str:
        """As HTML; every cell is escaped."""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.columns)
        rows = "".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        return (
            f"<section><h2>{html.escape(self.title)}</h2><p>{html.escape(self.note)}</p>"
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>'
        )


@dataclass(frozen=True, slots=True)
class Heading:
    """A data set's title, and the names of the two figures that stand for it."""

    title: str
    correctness: str
    retrieval: str


def headline(task: str, conditions: Sequence[Condition]) -> Heading:
    """What a data set is headed by: what its figures allow."""
    known = HEADLINES.get(task) or Headline(task, ("answer_in_text", "label_accuracy", "rouge_l"))
    retrieval = ("free_success@1", "free_page_success@1", "free_answer_success@1")
    return Heading(
        known.title, _first_known(known.correctness, task, conditions), _first_known(retrieval, task, conditions)
    )


def overview(conditions: Sequence[Condition], tasks: Sequence[str]) -> list[Table]:
    """Conditions by data sets: correctness and retrieval."""
    found = [headline(task, conditions) for task in tasks]
    tables = []
    for what in ("correctness", "retrieval"):
        columns = ["", *(f"{head.title}: {label_of(getattr(head, what))}" for head in found)]
        rows = [
            [c.name, *(cell(c.figure(task, getattr(head, what))) for task, head in zip(tasks, found, strict=True))]
            for c in conditions
        ]
        note = "Means with 95 % bootstrap intervals over questions; n is the number of questions."
        tables.append(Table(what.capitalize(), note, columns, rows))
    return tables


def task_table(task: str, conditions: Sequence[Condition]) -> Table:
    """All figures of a data set, conditions beside each other."""
    names = list(
        dict.fromkeys(
            name for c in conditions if task in c.tasks for run in c.runs for name in run.evaluations[task].figures
        )
    )
    known = [name for name in names if any((f := c.figure(task, name)) and f.value is not None for c in conditions)]
    absent = [f"{label_of(name)}: {_why_absent(name, names, known)}." for name in NOT_RUN if name not in known]
    rows = [[label_of(name), *(cell(c.figure(task, name)) for c in conditions)] for name in known]
    note = "Every question that was asked is scored. " + " ".join(absent)
    return Table(f"All figures of {_title(task)}", note.strip(), ["", *(c.name for c in conditions)], rows)


def _why_absent(name: str, names: Sequence[str], known: Sequence[str]) -> str:
    """Why a figure that needs another model has no value, for all that the named and the known figures tell."""
    if name == "claim_recall" and "citation_recall" in known:
        return "not measured (the questions bring no claims)"
    if name in names:
        return "not measured (it takes two questions with a long answer)"
    return f"not run ({NOT_RUN[name]})"


def comparison(tasks: Sequence[str], conditions: Sequence[Condition]) -> Table | None:
    """Each condition against the first one, question by question; None where there is only one."""
    rows = []
    for task in tasks:
        for other in conditions[1:]:
            for name in COMPARED:
                difference = _difference(task, name, conditions[0], other)
                if difference is not None:
                    rows.append([f"{_title(task)}, {other.name}: {label_of(name)}", *_told(difference)])
    if not rows:
        return None
    note = (
        "Differences on the same questions, with 95 % intervals over questions and seeds; p from a randomisation test "
        "over questions, seeds averaged, not corrected for the number of rows."
    )
    return Table(f"Compared with {conditions[0].name}", note, ["", "difference", "interval", "p", "n", "seeds"], rows)


def cell(figure: Figure | None) -> str:
    """A figure with its interval and count."""
    if figure is None or figure.value is None:
        return "-"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.3f} (n {figure.count:,})"
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}] (n {figure.count:,})"


def _difference(task: str, name: str, first: Condition, other: Condition) -> metrics.Difference | None:
    if task not in first.tasks or task not in other.tasks:
        return None
    theirs = set(other.ids(task, name))
    ids = [id for id in first.ids(task, name) if id in theirs]
    if not ids:
        return None
    return metrics.paired_difference(first.scores(task, name, ids), other.scores(task, name, ids))


def _told(difference: metrics.Difference) -> list[str]:
    return [
        f"{difference.value:+.3f}",
        f"[{difference.low:+.3f}, {difference.high:+.3f}]",
        f"{difference.p:.4f}",
        f"{difference.questions:,}",
        " and ".join(map(str, difference.seeds)),
    ]


def _first_known(names: Sequence[str], task: str, conditions: Sequence[Condition]) -> str:
    for name in names:
        if any((figure := c.figure(task, name)) and figure.value is not None for c in conditions):
            return name
    return names[-1]


def _title(task: str) -> str:
    return HEADLINES[task].title if task in HEADLINES else task


def _bare(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
