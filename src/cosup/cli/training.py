"""Training a model, and turning it into others."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cosup.cli.options import HybridOption, QuoteOption, StatementsOption


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Overrides a key: section.key=value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> without it.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run folder first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate memory and time.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Of --dry-run: how many processes will share a step.")
    ] = None,
) -> None:
    """Train a model from a recipe; go on with an interrupted run of the same recipe."""
    from cosup import terminal
    from cosup.config import load_recipe
    from cosup.train import estimate_run, remove_run, train_recipe

    settings = load_recipe(recipe, overrides or ())
    if dry_run:
        terminal.show_settings(estimate_run(settings, processes=processes).table())
        return
    run = out or Path("runs") / settings.name
    if fresh:
        remove_run(run)
    with terminal.training_bar() as bar:
        train_recipe(settings, run, callbacks=[bar], on_start=terminal.show_settings)
    terminal.out.print(f"saved: {run}/model, {run}/metrics.jsonl, {run}/curves.png", soft_wrap=True)


def export(
    source: Annotated[Path, typer.Argument(help="RUN/checkpoints/checkpoint-N, or a run or model folder.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge adapters into full weights.")] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Of the weights; auto leaves them as they are.")
    ] = "auto",
    quote: QuoteOption = None,
    statements: StatementsOption = None,
    hybrid: HybridOption = None,
) -> None:
    """Turn a checkpoint, or a run, into a model folder of plain Hugging Face folders.

    --quote, --statements and --hybrid are how it will answer where a request says nothing else.
    """
    from cosup.train import export_model

    chosen = {"quote": quote, "statements": statements, "hybrid": hybrid}
    answers = {name: value for name, value in chosen.items() if value is not None}
    export_model(source, out, merge=merge, dtype=dtype, answers=answers)
    print(f"saved: {out}")


def import_(
    gen: Annotated[str, typer.Option(help="The published generator: a Hugging Face name or a folder.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    emb: Annotated[str | None, typer.Option(help="The published Emb_seq of a co-supervised pair.")] = None,
    retriever: Annotated[
        str | None, typer.Option(help="In its place, of separate training: the LM that encodes both sides.")
    ] = None,
) -> None:
    """Turn the checkpoints published with the paper into a model folder."""
    from cosup.model import import_published

    import_published(gen, emb, out=out, retriever=retriever)
    print(f"saved: {out}")
