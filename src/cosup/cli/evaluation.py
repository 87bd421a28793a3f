"""Measuring, comparing, and looking into what was learnt."""

from pathlib import Path
from typing import Annotated

import typer

from cosup.cli.options import (
    DEFAULT_MODEL,
    HybridOption,
    IndexOption,
    ModelOption,
    NewTokensOption,
    QuoteOption,
    StatementsOption,
)


def evaluate(
    index: IndexOption,
    model: ModelOption = DEFAULT_MODEL,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", "--questions", help="Files of questions, in any known format, or names in --data."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The folder of data sets that --tasks names.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder, which goes on where it stopped; evaluations/ of the model without.")
    ] = None,
    mode: Annotated[str, typer.Option(help="cosup, static, none or bm25.")] = "cosup",
    whole_corpus: Annotated[
        bool, typer.Option("--whole-corpus", help="Retrieve from all passages, also where questions bring their own.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions of each.")] = None,
    max_new_tokens: NewTokensOption = 64,
    quote: QuoteOption = None,
    statements: StatementsOption = None,
    hybrid: HybridOption = None,
    nli: Annotated[str, typer.Option(help="An NLI model, for citation recall and precision; not run without.")] = "",
    mauve: Annotated[str, typer.Option(help="A causal LM, for MAUVE; not run without.")] = "",
    name: Annotated[
        str, typer.Option(help="The condition; runs of several seeds share it. The folder's without.")
    ] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run folder first.")] = False,
) -> None:
    """Measure retrieval (forced and free, BM25's beside them), answers, grounding, form, and the ntp loss."""
    from cosup import terminal
    from cosup.engine import Options
    from cosup.evaluate import HuggingFaceNli, RunSettings, evaluate_tasks, read_tasks, remove_run
    from cosup.index import open_index
    from cosup.model import CoSupModel

    options = Options(max_new_tokens=max_new_tokens, quote=quote, statements=statements, hybrid=hybrid)
    settings = RunSettings(mode, not whole_corpus, options, name=name, mauve_model=mauve)  # type: ignore[arg-type]
    asked = read_tasks(tasks or [], data=data, limit=limit)
    place = out or (Path("runs") / model if model == DEFAULT_MODEL else model) / "evaluations"
    if fresh:
        remove_run(place)
    judge = HuggingFaceNli(nli) if nli else None
    opened, loaded = open_index(index), CoSupModel.load(model)
    evaluations = evaluate_tasks(
        loaded,
        opened,
        asked,
        place,
        settings=settings,
        source=model,
        nli=judge,
        counter=lambda what, total, unit: terminal.counting(what, total, unit=unit),
    )
    for task, evaluation in evaluations.items():
        terminal.show_figures({task: evaluation})
    terminal.out.print(f"saved: {place}; `cosup report {place}` shows all figures", soft_wrap=True)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of `cosup evaluate`; the first is compared with.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and report.html.")] = Path("report"),
) -> None:
    """Compare evaluation runs: tables, pictures, and the questions side by side."""
    from cosup.report import write_report

    write_report(runs, out)
    print(f"saved: {out}/report.md, {out}/report.html")


def analyze(
    models: Annotated[
        list[Path], typer.Argument(help="Models, checkpoints or folders of checkpoints, in the order of training.")
    ],
    passages: Annotated[list[Path], typer.Option("--passages", help="JSONL of passages; may be repeated.")],
    questions: Annotated[Path, typer.Option("--questions", help="JSONL of questions with gold passages.")],
    out: Annotated[Path, typer.Option(help="Folder for spaces.json, spaces.md and spaces.png.")],
    most: Annotated[int, typer.Option(min=10, help="Most passages, questions and token states that are taken.")] = 2000,
) -> None:
    """Look at the sequence space and the token space of a model, checkpoint by checkpoint."""
    from cosup import terminal
    from cosup.analyze import analyze_models, stages
    from cosup.data import read_passages, read_questions

    corpus, asked = list(read_passages(*passages)), list(read_questions(questions))
    found = stages(models)
    with terminal.counting("looking at", len(found), unit="models") as on_progress:
        analyze_models(found, corpus, asked, out, most=most, on_progress=on_progress)
    print(f"saved: {out}/spaces.json, {out}/spaces.md, {out}/spaces.png")
