"""The command line: parse, call, print. Whatever is slow to import is imported inside the commands."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from cosup.config import UserError

app = typer.Typer(
    help="Language models that retrieve while they write: train, index, ask, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Check, convert and build data.", no_args_is_help=True)
index_app = typer.Typer(help="Build and search indexes of passages.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(index_app, name="index")

ModelOption = Annotated[Path, typer.Option("--model", help="A run folder of `cosup train`, or a model folder.")]
IndexOption = Annotated[Path, typer.Option("--index", help="An index folder of `cosup index build`.")]
TaskOption = Annotated[str, typer.Option("--task", help="Which task's instruction the question is given.")]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens that the model may choose.")]


def main() -> None:
    """Entry point: a UserError is one sentence on standard error and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe; see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Overrides a key: section.key=value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> without it.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run folder first.")] = False,
) -> None:
    """Train a model from a recipe; go on with an interrupted run of the same recipe."""
    from cosup import terminal
    from cosup.config import load_recipe
    from cosup.train import remove_run, train_recipe

    settings = load_recipe(recipe, overrides or ())
    run = out or Path("runs") / settings.name
    if fresh:
        remove_run(run)
    train_recipe(settings, run, callbacks=[terminal.training_callback()], on_start=terminal.show_settings)
    terminal.out.print(f"saved: {run}/model, {run}/metrics.jsonl, {run}/curves.png", soft_wrap=True)


@index_app.command("build")
def index_build(
    model: ModelOption,
    passages: Annotated[list[Path], typer.Option("--passages", help="JSONL of passages; may be repeated.")],
    out: Annotated[Path, typer.Option(help="The index folder to write.")],
    cited_by: Annotated[
        Path | None, typer.Option(help="Only the passages that are gold for a question of this JSONL file.")
    ] = None,
) -> None:
    """Embed passages and write an index for exact search."""
    from cosup import terminal
    from cosup.data import read_passages, read_questions
    from cosup.index import build_index
    from cosup.model import CoSupModel

    chosen = list(read_passages(*passages))
    if cited_by is not None:
        cited = {passage for question in read_questions(cited_by) for passage in question.gold}
        chosen = [passage for passage in chosen if passage.id in cited]
    loaded = CoSupModel.load(model)
    with terminal.counting("indexing", len(chosen), unit="passages") as on_progress:
        build_index(chosen, loaded, out, on_progress=on_progress)
    if shortened := len(loaded.template.shortened):
        limit = loaded.settings.template.max_passage_tokens
        terminal.err.print(
            f"{shortened:,} passages were shortened to {limit} tokens; split them to keep all of their text"
        )
    terminal.out.print(f"saved: {out}")


@index_app.command("search")
def index_search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    index: IndexOption,
    model: ModelOption,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="How many passages.")] = 5,
    task: TaskOption = "",
) -> None:
    """Search an index with the model's state at a [Ret] put right after the prompt."""
    from cosup import terminal
    from cosup.engine import check_index
    from cosup.index import FlatIndex
    from cosup.model import CoSupModel

    opened, loaded = FlatIndex(index), CoSupModel.load(model)
    check_index(loaded, opened)
    (hits,) = opened.search(loaded.query([loaded.template.prompt(query, task=task)]), k)
    terminal.show_hits(hits, opened.get([hit.id for hit in hits]))


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    model: ModelOption,
    index: IndexOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    task: TaskOption = "",
    max_new_tokens: NewTokensOption = 128,
    retrieve_first: Annotated[
        bool, typer.Option(help="Begin the answer with a retrieval, whatever the model would.")
    ] = False,
) -> None:
    """Answer a question with cited passages, as it is written."""
    from cosup import terminal
    from cosup.engine import Engine, Options
    from cosup.index import FlatIndex
    from cosup.model import CoSupModel

    options = Options(max_new_tokens=max_new_tokens, retrieve_first=retrieve_first, rows=1)
    opened, loaded = FlatIndex(index), CoSupModel.load(model)
    engine = Engine(loaded, opened, options)
    prompt = loaded.template.prompt(question, task=task)
    if not as_json:
        terminal.show_answer(engine.stream(prompt), opened.get)
        return
    (response,) = engine.generate([prompt])
    cited = list(dict.fromkeys(claim.passage for claim in response.claims))
    print(terminal.answer_json(question, response, opened.get(cited)))


@app.command()
def generate(
    questions: Annotated[Path, typer.Option("--input", help="JSONL of questions.")],
    output: Annotated[Path, typer.Option("--output", help="JSONL of answers to write.")],
    model: ModelOption,
    index: IndexOption,
    max_new_tokens: NewTokensOption = 128,
) -> None:
    """Answer a file of questions."""
    from cosup import terminal
    from cosup.data import read_questions
    from cosup.engine import Engine, Options
    from cosup.files import atomic_file
    from cosup.index import FlatIndex
    from cosup.model import CoSupModel

    asked = list(read_questions(questions))
    opened, loaded = FlatIndex(index), CoSupModel.load(model)
    engine = Engine(loaded, opened, Options(max_new_tokens=max_new_tokens))
    prompts = [loaded.template.prompt(question.question, task=question.task) for question in asked]
    with terminal.counting("answering", len(asked), unit="questions") as on_progress:
        responses = engine.generate(prompts, on_progress=on_progress)
    with atomic_file(output) as file:
        for question, response in zip(asked, responses, strict=True):
            cited = list(dict.fromkeys(claim.passage for claim in response.claims))
            line = terminal.answer_json(question.question, response, opened.get(cited), id=question.id)
            file.write(line.encode() + b"\n")
    terminal.out.print(f"saved: {output}")


@app.command()
def evaluate(
    model: ModelOption,
    index: IndexOption,
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
    from cosup.index import FlatIndex
    from cosup.model import CoSupModel

    options = Options(max_new_tokens=max_new_tokens)
    settings = RunSettings(mode, not whole_corpus, options, name=name, mauve_model=mauve)  # type: ignore[arg-type]
    asked = read_tasks(tasks or [], data=data, limit=limit)
    place = out or model / "evaluations"
    if fresh:
        remove_run(place)
    judge = HuggingFaceNli(nli) if nli else None
    opened, loaded = FlatIndex(index), CoSupModel.load(model)
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


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of `cosup evaluate`; the first is compared with.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and report.html.")] = Path("report"),
) -> None:
    """Compare evaluation runs: tables, pictures, and the questions side by side."""
    from cosup.report import write_report

    write_report(runs, out)
    print(f"saved: {out}/report.md, {out}/report.html")


@app.command()
def analyze(
    models: Annotated[list[Path], typer.Argument(help="Model folders or checkpoints, in the order of training.")],
    passages: Annotated[list[Path], typer.Option("--passages", help="JSONL of passages; may be repeated.")],
    questions: Annotated[Path, typer.Option("--questions", help="JSONL of questions with gold passages.")],
    out: Annotated[Path, typer.Option(help="Folder for spaces.json, spaces.md and spaces.png.")],
    most: Annotated[int, typer.Option(min=10, help="Most passages, questions and token states that are taken.")] = 2000,
) -> None:
    """Look at the sequence space and the token space of a model, checkpoint by checkpoint."""
    from cosup import terminal
    from cosup.analyze import analyze_models
    from cosup.data import read_passages, read_questions

    corpus, asked = list(read_passages(*passages)), list(read_questions(questions))
    with terminal.counting("looking at", len(models), unit="models") as on_progress:
        analyze_models(models, corpus, asked, out, most=most, on_progress=on_progress)
    print(f"saved: {out}/spaces.json, {out}/spaces.md, {out}/spaces.png")


@data_app.command("check")
def data_check(files: Annotated[list[Path], typer.Argument(help="JSONL of passages, questions or examples.")]) -> None:
    """Report every problem of JSONL files with its file and line."""
    from cosup.data.check import check

    problems = check(files)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{len(problems):,} problems in {len(files)} files")
    print(f"{len(files)} files, no problem")


@data_app.command("convert")
def data_convert(
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

    if to not in ("examples", "questions"):
        raise UserError(f"--to must be examples or questions, not {to!r}")
    read = read_any(questions, texts=texts)
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
    titles = {passage.id: passage.title for passage in corpus}
    left_out: Counter[str] = Counter()
    count = write_records(out, convert(read.questions, passages=titles, titles=titles, left_out=left_out))
    reasons = "".join(f"; {n:,} left out: {reason}" for reason, n in left_out.items())
    print(f"{count:,} examples in {out}{reasons}")


@data_app.command("pages")
def data_pages(
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


@data_app.command("build")
def data_build(
    name: Annotated[str, typer.Argument(help="worldfacts")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Of wordings, split and order.")] = 0,
) -> None:
    """Build a data set that needs no network."""
    from cosup.data.worldfacts import build_worldfacts

    if name != "worldfacts":
        raise UserError(f"there is no built-in data set {name!r}; there is worldfacts")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty, and would be replaced; name another folder")
    summary = build_worldfacts(out, seed=seed)
    print(
        f"{summary.passages:,} passages about {summary.entities:,} entities; questions: {summary.train:,} train, "
        f"{summary.dev:,} dev, {summary.test:,} test; in {out}"
    )


@app.command()
def ingest(
    paths: Annotated[list[Path], typer.Argument(help=".txt, .md, .html, .jsonl files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="JSONL of passages to write.")],
    max_words: Annotated[int, typer.Option(min=10, help="Most words in a passage.")] = 120,
) -> None:
    """Turn one's own documents into passages."""
    from cosup.data import write_records
    from cosup.data.documents import ingest as read_documents

    skipped: list[Path] = []
    count = write_records(out, read_documents(paths, max_words=max_words, on_skip=skipped.append))
    for path in skipped:
        print(f"skipped: {path}", file=sys.stderr)
    print(f"{count:,} passages in {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(min=0.01, help="Training budget in minutes.")] = 7.2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of reusing what is finished.")] = False,
) -> None:
    """Watch the whole method work on a real small model: before, training, after, five cited answers."""
    from cosup import terminal
    from cosup.demo import OPTIONS, Demo
    from cosup.engine import Engine
    from cosup.index import FlatIndex
    from cosup.model import CoSupModel

    steps = Demo(out, minutes=minutes, counter=lambda what, total, unit: terminal.counting(what, total, unit=unit))
    if fresh:
        steps.start_over()
    terminal.step("Building worldfacts")
    steps.build_data()
    terminal.step("Evaluating the untrained model")
    before = steps.before()
    terminal.step(f"Co-supervising Gen and Emb_seq for {minutes:g} minutes")
    steps.train(callbacks=[terminal.training_callback()], on_start=terminal.show_settings)
    terminal.step("Indexing and evaluating the trained model")
    after = steps.after()
    terminal.step("Before and after")
    terminal.show_figures({"before": before, "after": after})
    terminal.step("Five test questions, about entities that were never trained on")
    model, index = CoSupModel.load(steps.run), FlatIndex(out / "index")
    engine = Engine(model, index, OPTIONS)
    for question in steps.shown():
        terminal.show_question(question.question)
        terminal.show_answer(engine.stream(model.template.prompt(question.question, task=question.task)), index.get)
    terminal.show_next_steps(out)


if __name__ == "__main__":
    main()
