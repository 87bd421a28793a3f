"""Options that several commands share."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cosup.config import RELEASED

if TYPE_CHECKING:
    from cosup.engine import Options

ModelOption = Annotated[
    Path,
    typer.Option("--model", envvar="COSUP_MODEL", help="A run folder of `cosup train`, or a model folder."),
]
DEFAULT_MODEL = Path(RELEASED)
IndexOption = Annotated[
    str, typer.Option("--index", help="An index folder of `cosup index build`, or a milvus:// address.")
]
TaskOption = Annotated[str, typer.Option("--task", help="Which task's instruction the question is given.")]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens that the model may choose.")]
_AS_THE_MODEL = "as the model has it"
QuoteOption = Annotated[
    bool | None,
    typer.Option(
        "--quote/--no-quote",
        help="Let each claim be a piece of its passage, word for word.",
        show_default=_AS_THE_MODEL,
    ),
]
StatementsOption = Annotated[
    bool | None,
    typer.Option(
        "--statements/--no-statements",
        help="Show a claim as its passage states it: the sentence that holds it or is nearest, or 20 words of that.",
        show_default=_AS_THE_MODEL,
    ),
]
HybridOption = Annotated[
    float | None,
    typer.Option(
        "--hybrid",
        min=0.0,
        help="Rank by words in common with the question too, as BM25 does; try 0.2. 0: by the model's state alone.",
        show_default=_AS_THE_MODEL,
    ),
]
PassagesOption = Annotated[
    list[str],
    typer.Option("--passages", help="JSONL, Parquet, a folder of Parquet, or hf:NAME[:SPLIT]; may be repeated."),
]


def _writing(
    max_new_tokens: NewTokensOption = 128,
    mode: Annotated[
        Literal["cosup", "static", "none"],
        typer.Option(help="Retrieve where the model asks, once before it writes, or never."),
    ] = "cosup",
    retrieve_first: Annotated[
        bool, typer.Option("--retrieve-first", help="Begin the answer with a retrieval, whatever the model would.")
    ] = False,
    max_retrievals: Annotated[int, typer.Option("--max-retrievals", min=0, help="Most retrievals in an answer.")] = 4,
    min_score: Annotated[
        float | None, typer.Option("--min-score", help="Insert no passage that scores less; the answer says so.")
    ] = None,
    forget_passages: Annotated[
        bool, typer.Option("--forget-passages", help="Take each passage out of the context when its claim is closed.")
    ] = False,
    quote: QuoteOption = None,
    statements: StatementsOption = None,
    hybrid: HybridOption = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher values sample.")] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Sample from the likeliest tokens up to this probability.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", help="Sample from so many of the likeliest tokens; 0: from all.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this string; may be repeated.")] = None,
) -> "Options":
    from cosup.engine import Options

    return Options(
        max_new_tokens=max_new_tokens,
        mode=mode,
        retrieve_first=retrieve_first,
        max_retrievals=max_retrievals,
        min_score=min_score,
        forget_passages=forget_passages,
        quote=quote,
        statements=statements,
        hybrid=hybrid,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
    )


def with_writing_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each setting of the engine, which it gets together as `options`."""
    shared = inspect.signature(_writing).parameters
    own = inspect.signature(command).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in shared}
        command(**given, options=_writing(**chosen))

    taken = [*(parameter for name, parameter in own.items() if name != "options"), *shared.values()]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in taken]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}
    return run
