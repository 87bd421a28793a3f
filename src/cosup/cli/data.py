"""Data: checked, converted, built; documents turned into passages."""

import itertools
import sys
from pathlib import Path
from typing import Annotated

import typer

from cosup.config import UserError

app = typer.Typer(help="Check, convert and build data.", no_args_is_help=True)


@app.command("check")
def check(files: Annotated[list[Path], typer.Argument(help="JSONL of passages, questions or examples.")]) -> None:
    """Report every problem of JSONL files with its file and line."""
    from cosup.data.check import check

    problems = check(files)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{_counted(len(problems), 'problem')} in {_counted(len(files), 'file')}")
    print(f"{_counted(len(files), 'file')}, no problem")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


@app.command("convert")
def convert(
    questions: Annotated[
        Path, typer.Argument(help="Questions: JSONL of ours, SQuAD, KILT, ALCE, HotpotQA, FEVER; or training data.")
    ],
    passages: Annotated[
        Path, typer.Option("--passages", help="JSONL of passages; a format that holds them has them written there.")
    ],
    out: Annotated[Path, typer.Option(help="JSONL to write.")],
    to: Annotated[str, typer.Option("--to", help="What to make: examples or questions.")] = "examples",
    texts: Annotated[Path | None, typer.Option(help="The JSON of passages that the paper's pickle refers to.")] = None,
) -> None:
    """Make training examples of questions by each task's rule, or questions of another format."""
    from collections import Counter

    from cosup.data import read_passages, write_records
    from cosup.data.convert import convert
    from cosup.data.formats import read_any
    from cosup.files import refuse_overwriting

    if to not in ("examples", "questions"):
        raise UserError(f"--to must be examples or questions, not {to!r}")
    refuse_overwriting(out, [questions, passages])
    read = read_any(questions, texts=texts)
    if not read.questions and not read.examples:
        raise UserError(f"{questions} holds no questions to convert")
    if read.passages and passages.exists():
        raise UserError(f"{passages} exists: the passages of {questions} would replace it; name another file")
    if read.passages:
        write_records(passages, read.passages)
    if to == "questions" or read.examples:
        if to == "questions" and read.examples:
            raise UserError(f"{questions} holds training data, not questions; leave --to out")
        print(f"{write_records(out, read.examples or read.questions):,} {to} in {out}")
        return
    corpus = read.passages or list(read_passages(passages))
    known = {passage.id: passage for passage in corpus}
    left_out: Counter[str] = Counter()
    count = write_records(out, convert(read.questions, passages=known, left_out=left_out))
    reasons = "".join(f"; {n:,} left out: {reason}" for reason, n in left_out.items())
    print(f"{count:,} examples in {out}{reasons}")


@app.command("pages")
def pages(
    pages: Annotated[Path, typer.Argument(help="KILT's knowledge source, or a file of FEVER's Wikipedia pages.")],
    out: Annotated[Path, typer.Option(help="JSONL of passages to write.")],
) -> None:
    """Turn the pages that KILT and FEVER point into into passages."""
    from cosup.data import write_records
    from cosup.data.fever import read_fever_pages
    from cosup.data.foreign import first_json_line
    from cosup.data.kilt import read_kilt_pages

    first = first_json_line(pages)
    reader = read_fever_pages if isinstance(first, dict) and "lines" in first else read_kilt_pages
    print(f"{write_records(out, reader(pages)):,} passages in {out}")


@app.command("build")
def build(
    name: Annotated[str, typer.Argument(help="worldfacts")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Of wordings, split and order.")] = 0,
) -> None:
    """Build a data set that needs no network."""
    from cosup.data.worldfacts import build_worldfacts

    if name != "worldfacts":
        raise UserError(f"there is no built-in data set {name!r}; there is worldfacts")
    if out.is_file():
        raise UserError(f"{out} is a file; name a folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty, and would be replaced; name another folder")
    summary = build_worldfacts(out, seed=seed)
    print(
        f"{summary.passages:,} passages about {summary.entities:,} entities; questions: {summary.train:,} train, "
        f"{summary.dev:,} dev, {summary.test:,} test; in {out}"
    )


def ingest(
    paths: Annotated[list[Path], typer.Argument(help=".txt, .md, .html, .pdf, .jsonl files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="JSONL of passages to write.")],
    max_words: Annotated[int, typer.Option(min=10, help="Most words in a passage.")] = 120,
) -> None:
    """Turn one's own documents into passages."""
    from cosup.data import write_records
    from cosup.data.documents import ingest as read_documents
    from cosup.files import refuse_overwriting

    refuse_overwriting(out, paths)
    skipped: list[Path] = []
    passages = read_documents(paths, max_words=max_words, on_skip=skipped.append, leave_out=out)
    first = next(passages, None)
    for path in skipped:
        print(f"skipped: {path}", file=sys.stderr)
    if first is None:
        raise UserError(f"the documents hold no text, so {out} was not written; name others")
    count = write_records(out, itertools.chain([first], passages))
    print(f"{count:,} passages in {out}")
