"""The command line: parse, call, print. Whatever is slow to import is imported inside the commands."""

import io
import logging
import sys
from collections.abc import Callable

import typer

from cosup.cli import answering, data, evaluation, index, serving, training
from cosup.config import UserError

app = typer.Typer(
    help="Language models that retrieve while they write: train, index, ask, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": answering.demo,
    "ingest": data.ingest,
    "train": training.train,
    "export": training.export,
    "import": training.import_,
    "ask": answering.ask,
    "generate": answering.generate,
    "evaluate": evaluation.evaluate,
    "report": evaluation.report,
    "analyze": evaluation.analyze,
    "mine": index.mine,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)
app.add_typer(data.app, name="data")
app.add_typer(index.app, name="index")
app.add_typer(serving.app, name="serve")


def main() -> None:
    """Entry point: a UserError is one sentence on standard error and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("cosup.index.kept").setLevel(logging.INFO)  # a wait that has a reason
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of another encoding shows \u27e8 instead of ending it all
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
