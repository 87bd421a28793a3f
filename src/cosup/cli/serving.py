"""A server and its keys."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cosup.cli.options import DEFAULT_MODEL, HybridOption, ModelOption, QuoteOption, StatementsOption
from cosup.config import UserError

app = typer.Typer(help="Serve an OpenAI-compatible API and a page to ask it.")
keys_app = typer.Typer(help="API keys of a server.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")


@app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    index: Annotated[str | None, typer.Option("--index", help="An index folder, or a milvus:// address.")] = None,
    host: Annotated[str, typer.Option(help="Address to bind; other than 127.0.0.1 needs --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    keys: Annotated[Path | None, typer.Option(help="File of API keys; see `cosup serve keys add`.")] = None,
    name: Annotated[str, typer.Option(help="The model's name, as clients see it.")] = "cosup",
    quote: QuoteOption = None,
    statements: StatementsOption = None,
    hybrid: HybridOption = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait beside them.")] = 64,
    request_seconds: Annotated[float, typer.Option(help="Longest time for a request.")] = 300.0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="To compute in; in float32 an answer does not depend on what is answered beside it."),
    ] = "auto",
    origin: Annotated[list[str] | None, typer.Option(help="A site whose pages may ask (CORS).")] = None,
) -> None:
    """Serve an OpenAI-compatible API that streams cited answers, and a page to ask it."""
    if context.invoked_subcommand is not None:
        return
    from cosup.serve import Limits
    from cosup.serve import serve as run_server
    from cosup.serve.run import check_address, check_port

    if index is None:
        raise UserError("serving needs an index: cosup serve --index FOLDER [--model FOLDER]")
    check_address(host, keys)
    check_port(host, port)
    from cosup.engine import Engine, Options
    from cosup.index import open_index
    from cosup.model import CoSupModel

    limits = Limits(queue=queue, request_seconds=request_seconds)
    options = Options(rows=rows, quote=quote, statements=statements, hybrid=hybrid)
    engine = Engine(CoSupModel.load(model, dtype=dtype), open_index(index), options)
    print(f"serving {name} at http://{host}:{port}", flush=True)
    run_server(engine, host=host, port=port, name=name, keys_file=keys, limits=limits, origins=tuple(origin or ()))


@keys_app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: Annotated[Path, typer.Option(help="The file of keys.")],
    write: Annotated[bool, typer.Option("--write", help="Also allow to add and remove passages.")] = False,
) -> None:
    """Make an API key and print it, once; the file keeps its hash."""
    from cosup.serve import add_key

    print(add_key(file, name, scopes=["read", "write"] if write else ["read"]))


@keys_app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: Annotated[Path, typer.Option(help="The file of keys.")],
) -> None:
    """Remove an API key by its name."""
    from cosup.serve.keys import remove_key

    remove_key(file, name)
