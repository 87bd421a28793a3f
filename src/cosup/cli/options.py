"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

ModelOption = Annotated[Path, typer.Option("--model", help="A run folder of `cosup train`, or a model folder.")]
IndexOption = Annotated[
    str, typer.Option("--index", help="An index folder of `cosup index build`, or a milvus:// address.")
]
TaskOption = Annotated[str, typer.Option("--task", help="Which task's instruction the question is given.")]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens that the model may choose.")]
ModeOption = Annotated[
    Literal["cosup", "static", "none"],
    typer.Option(help="Retrieve where the model asks, once before it writes, or never."),
]
RetrievalsOption = Annotated[int, typer.Option("--max-retrievals", min=0, help="Most retrievals in an answer.")]
ScoreOption = Annotated[
    float | None, typer.Option("--min-score", help="Insert no passage that scores less; the answer says so.")
]
FirstOption = Annotated[
    bool, typer.Option("--retrieve-first", help="Begin the answer with a retrieval, whatever the model would.")
]
ForgetOption = Annotated[
    bool, typer.Option("--forget-passages", help="Take each passage out of the context when its claim is closed.")
]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token; higher values sample.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens up to this probability.")]
TopKOption = Annotated[int, typer.Option("--top-k", help="Sample from so many of the likeliest tokens; 0: from all.")]
SeedOption = Annotated[int, typer.Option(help="Of the sampling.")]

StopOption = Annotated[list[str] | None, typer.Option("--stop", help="End before this string; may be repeated.")]

PassagesOption = Annotated[
    list[str],
    typer.Option("--passages", help="JSONL, Parquet, a folder of Parquet, or hf:NAME[:SPLIT]; may be repeated."),
]
