"""What a person sees in a terminal: progress, tables, and an answer as it is written."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text as RichText

from cosup.data import Passage
from cosup.engine import ClaimClosed, ClaimOpened, Event, Finished, Retrieved, Token
from cosup.evaluate import LABELS, Evaluation, Figure
from cosup.index import Estimate, FaissIndex, Hit, Index
from cosup.template import Response

T = TypeVar("T")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


_CONTROL_CODES = (*range(9), *range(11, 32), *range(127, 160))  # tab and newline are shown as they are


def harmless(text: str) -> str:
    """Text of users, documents and models with its control codes replaced, so that it can't steer the terminal."""
    return text.translate(dict.fromkeys(_CONTROL_CODES, "\N{REPLACEMENT CHARACTER}"))


@contextmanager
def counting(what: str, total: int | None, *, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar that is told how many are done, with the rate; on standard error, so that output can be piped."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=err, transient=True)
    task = progress.add_task(what, total=total)
    with progress if err.is_terminal else nullcontext():  # where there is none, it would leave an empty line
        yield lambda done: progress.update(task, completed=done)
    finished = progress.tasks[0]
    seconds = finished.elapsed or 1e-9
    err.print(f"{what}: {finished.completed:,.0f} {unit}, {finished.completed / seconds:,.1f} {unit}/s", soft_wrap=True)


@contextmanager
def training_bar() -> Iterator[Any]:
    """A transformers callback that shows a bar with time left, and under it both losses, accuracy and speed.

    Where standard error is no terminal, it prints a line at each log. However the training ends, the terminal is left
    as it was.
    """
    from transformers import TrainerCallback

    columns = (
        SpinnerColumn(),
        TextColumn("training"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]}"),
    )
    progress = _BarAndFigures(*columns, console=err)
    task = progress.add_task("", total=1.0, left="", figures="starting")

    class TrainingBar(TrainerCallback):
        """Begins, moves and ends the bar."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            logged = [row for row in state.log_history if "progress" in row]
            self.begun = logged[-1] if logged else {"minutes": 0.0, "progress": 0.0}
            if err.is_terminal:
                progress.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "progress" not in logs:
                return
            figures, left = training_figures(state.global_step, logs), time_left(logs, self.begun)
            progress.update(task, completed=logs["progress"], left=left, figures=figures)
            if not err.is_terminal:
                err.print(f"training {logs['progress']:4.0%}  {figures}  {left}", soft_wrap=True)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.live.stop()

    try:
        yield TrainingBar()
    finally:  # a training that breaks off has no end; the cursor would stay hidden
        progress.live.stop()


class _BarAndFigures(Progress):
    """A bar, and its figures on a line of their own, since both on one are wider than many a terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield RichText(task.fields["figures"], overflow="ellipsis", no_wrap=True)


def training_figures(step: int, logs: Mapping[str, float]) -> str:
    """Step, losses, accuracy and speed in one line."""
    parts = [f"step {step}"]
    parts += [f"{name} {logs[name]:.3f}" for name in ("ntp", "nsp") if name in logs]
    if "accuracy" in logs:
        parts.append(f"accuracy {logs['accuracy']:.2f} of {logs['candidates']:.0f}")
    parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


def time_left(logs: Mapping[str, float], begun: Mapping[str, float]) -> str:
    """Minutes that a training goes on at the pace it had since it began, or went on."""
    minutes, progress = (logs[name] - begun[name] for name in ("minutes", "progress"))
    return f"{minutes / progress * (1 - logs['progress']):.1f} min left" if progress > 0 else ""


def show_settings(table: Mapping[str, str]) -> None:
    """Names and values in two columns."""
    grid = Table.grid(padding=(0, 2))
    for name, value in table.items():
        grid.add_row(f"[dim]{escape(name)}[/]", escape(value))
    out.print(grid)


def show_figures(columns: Mapping[str, Evaluation]) -> None:
    """A table of figures, one column an evaluation, each figure with its count."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("n", justify="right", style="dim")
    for name in columns:
        table.add_column(name, justify="right")
    last = list(columns.values())[-1]
    for name, label in LABELS.items():
        figures = [evaluation.figures[name] for evaluation in columns.values()]
        table.add_row(label, f"{last.figures[name].count:,}", *map(_number, figures))
    out.print(table)


def show_answer(events: Iterable[Event], get: Callable[[Sequence[str]], list[Passage]]) -> Response:
    """Streams an answer: text as it comes, a mark at each retrieval, numbered citations, the passages underneath."""
    numbers: dict[str, int] = {}
    open_passage = ""

    def cite() -> None:
        number = numbers.setdefault(open_passage, len(numbers) + 1)
        out.print(f"[bold cyan]\\[{number}][/]", end=" ")

    response = Response("")
    for event in events:
        if isinstance(event, Token) and not event.inserted:
            out.print(harmless(event.text), end="", soft_wrap=True, markup=False)
        elif isinstance(event, Retrieved):
            out.print("[dim]⟨retrieves⟩[/] ", end="")
        elif isinstance(event, ClaimOpened):
            open_passage = event.passage_id
        elif isinstance(event, ClaimClosed):
            cite()
            open_passage = ""
        elif isinstance(event, Finished):
            response = event.response
    if open_passage:  # the response ended inside a claim
        cite()
    out.print()
    scores = {claim.passage: claim.score for claim in reversed(response.claims)}
    for passage in get(list(numbers)):
        title = f"[bold]{escape(harmless(passage.title))}[/] " if passage.title else ""
        score = f"{passage.id}, score {scores[passage.id]:.3f}"
        out.print(f"\n[bold cyan]\\[{numbers[passage.id]}][/] {title}[dim]{escape(harmless(score))}[/]")
        out.print(harmless(passage.text), markup=False)
    if response.nothing_found:
        err.print("[dim](a retrieval found nothing good enough)[/]")
    if response.shortened:
        err.print("[dim](only the beginning was read of a passage that is too long)[/]")
    if response.reason == "error":
        err.print(f"[red]{escape(harmless(response.error))}[/]", soft_wrap=True)
    if response.reason == "length":
        err.print("[dim](stopped at the length limit)[/]")
    return response


def show_hits(hits: Sequence[Hit], passages: Sequence[Passage], *, query: str = "") -> None:
    """Passages found, best first, with their scores; the words of the query are highlighted."""
    words = {word for word in re.findall(r"\w+", query.casefold()) if len(word) > 2}
    for hit, passage in zip(hits, passages, strict=True):
        title, id = escape(harmless(passage.title)), escape(harmless(passage.id))
        out.print(f"[bold cyan]{hit.score:.3f}[/] [bold]{title}[/] [dim]{id}[/]")
        text = RichText(harmless(passage.text))
        for word in re.finditer(r"\w+", text.plain):
            if word[0].casefold() in words:
                text.stylize("bold yellow", word.start(), word.end())
        out.print(text)


def counted(items: Iterable[T], on_progress: Callable[[int], None]) -> Iterator[T]:
    """The items as they come, each told to `on_progress`."""
    for done, item in enumerate(items, start=1):
        yield item
        on_progress(done)


def show_estimate(estimate: Estimate, workers: int) -> None:
    """What a build would take."""
    tokens = "" if estimate.tokens is None else f", about {estimate.tokens:,} tokens"
    minutes = estimate.seconds / 60
    out.print(f"{estimate.passages:,} passages{tokens}; kind {estimate.kind}")
    out.print(f"embedding: about {minutes:,.1f} minutes of one worker like this one; you ask for {workers}")
    out.print(f"disk while it is built: about {estimate.disk / 1e6:,.1f} MB; free: {estimate.free / 1e6:,.1f} MB")


def show_index(index: Index) -> None:
    """What an index is, and what made it."""
    out.print(f"{len(index):,} passages, {index.dim} dimensions, inner product")
    out.print(f"embedder: {index.fingerprint}", soft_wrap=True)
    if not isinstance(index, FaissIndex):
        return
    manifest = index.manifest
    for key, value in manifest.layout.items():
        out.print(harmless(f"{key}: {value}"), markup=False, soft_wrap=True)
    size = sum(file.bytes for file in manifest.files())
    out.print(
        f"kind {manifest.kind}, vectors as {manifest.dtype}, {size / 1e6:,.1f} MB in {len(manifest.files())} files"
    )
    for entry in manifest.segments:
        effort = f", effort {entry.effort}, {entry.candidates} scored again"
        recall = f"{effort}: recall@10 {entry.recall:.3f} of its own vectors" if entry.effort else ""
        out.print(f"  segment of {entry.count:,}{recall}")
    out.print("history:")
    for line in index.history():
        details = ", ".join(f"{key} {value}" for key, value in line.items() if key not in ("time", "what"))
        out.print(harmless(f"  {line['time']} {line['what']}: {details}"), markup=False, soft_wrap=True)


def step(what: str) -> None:
    """A heading of the demo."""
    out.print(f"\n[bold]{escape(what)}[/]")


def show_question(question: str) -> None:
    """A question, before its answer."""
    out.print(f"\n[bold magenta]?[/] {escape(harmless(question))}")


def show_next_steps(folder: Path) -> None:
    """Where the demo saved everything, and how to go on with one's own documents."""
    out.print(
        f"""
[bold]Saved[/] in {folder}: worldfacts/ (data), run/ (recipe, metrics, curves.png, model), index/, before/, after/.

[bold]With your own documents[/], and the model that comes with cosup
  cosup ingest NOTES/ --out passages.jsonl
  cosup index build --passages passages.jsonl --out my-index
  cosup ask --index my-index "your question"
""",
        soft_wrap=True,
    )


def answer_json(question: str, response: Response, passages: Sequence[Passage], **more: str) -> str:
    """An answer as one JSON object; `more` fields come first."""
    fields = asdict(response)
    fields["passages"] = [{"id": p.id, "title": p.title, "text": p.text, "meta": p.meta} for p in passages]
    return json.dumps({**more, "question": question, **fields}, ensure_ascii=False)


def _number(figure: Figure) -> str:
    if figure.value is None:
        return "-"
    return f"{figure.value:.0f}" if float(figure.value).is_integer() and figure.value > 1 else f"{figure.value:.3f}"
