"""The command line: parse, call, print. Whatever is slow to import is imported inside the commands."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

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
serve_app = typer.Typer(help="Serve an OpenAI-compatible API and a page to ask it.")
keys_app = typer.Typer(help="API keys of a server.", no_args_is_help=True)
serve_app.add_typer(keys_app, name="keys")
app.add_typer(serve_app, name="serve")

ModelOption = Annotated[Path, typer.Option("--model", help="A run folder of `cosup train`, or a model folder.")]
IndexOption = Annotated[Path, typer.Option("--index", help="An index folder of `cosup index build`.")]
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
    train_recipe(settings, run, callbacks=[terminal.training_callback()], on_start=terminal.show_settings)
    terminal.out.print(f"saved: {run}/model, {run}/metrics.jsonl, {run}/curves.png", soft_wrap=True)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="RUN/checkpoints/checkpoint-N, or a run or model folder.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge adapters into full weights.")] = False,
) -> None:
    """Turn a checkpoint, or a run, into a model folder of plain Hugging Face folders."""
    from cosup.train import export_model

    export_model(source, out, merge=merge)
    print(f"saved: {out}")


@app.command("import")
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
    mode: ModeOption = "cosup",
    retrieve_first: FirstOption = False,
    max_retrievals: RetrievalsOption = 4,
    min_score: ScoreOption = None,
    forget_passages: ForgetOption = False,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    stop: StopOption = None,
) -> None:
    """Answer a question with cited passages, as it is written."""
    from cosup import terminal
    from cosup.engine import Engine, Options
    from cosup.index import FlatIndex
    from cosup.model import CoSupModel

    options = Options(
        max_new_tokens=max_new_tokens,
        mode=mode,
        retrieve_first=retrieve_first,
        max_retrievals=max_retrievals,
        min_score=min_score,
        forget_passages=forget_passages,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        rows=1,
    )
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
    mode: ModeOption = "cosup",
    retrieve_first: FirstOption = False,
    max_retrievals: RetrievalsOption = 4,
    min_score: ScoreOption = None,
    forget_passages: ForgetOption = False,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    stop: StopOption = None,
    rows: Annotated[int, typer.Option(min=1, help="Questions that are answered at once.")] = 16,
) -> None:
    """Answer a file of questions; a sampled answer depends on the seed and its question alone."""
    from cosup import terminal
    from cosup.data import read_questions
    from cosup.engine import Engine, Options
    from cosup.files import atomic_file
    from cosup.index import FlatIndex
    from cosup.model import CoSupModel

    options = Options(
        max_new_tokens=max_new_tokens,
        mode=mode,
        retrieve_first=retrieve_first,
        max_retrievals=max_retrievals,
        min_score=min_score,
        forget_passages=forget_passages,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
        rows=rows,
    )
    asked = list(read_questions(questions))
    opened, loaded = FlatIndex(index), CoSupModel.load(model)
    engine = Engine(loaded, opened, options)
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
    questions: Annotated[Path, typer.Option("--questions", help="JSONL of questions.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for figures.json and items.jsonl; evaluations/<name> of the run without it."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions.")] = None,
    max_new_tokens: NewTokensOption = 64,
) -> None:
    """Measure retrieval (forced and free, BM25's beside them), answers, form, and the ntp loss."""
    from cosup import terminal
    from cosup.data import read_questions
    from cosup.engine import Options
    from cosup.evaluate import evaluate_model
    from cosup.index import FlatIndex
    from cosup.model import CoSupModel

    asked = list(read_questions(questions))[:limit]
    place = out or model / "evaluations" / questions.name.split(".")[0]
    opened, loaded = FlatIndex(index), CoSupModel.load(model)
    with terminal.counting("asking", len(asked), unit="questions") as on_progress:
        options = Options(max_new_tokens=max_new_tokens)
        evaluation = evaluate_model(loaded, opened, asked, options=options, on_progress=on_progress)
    evaluation.save(place)
    terminal.show_figures({str(model): evaluation})
    terminal.out.print(f"saved: {place}", soft_wrap=True)


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
    questions: Annotated[Path, typer.Argument(help="JSONL of questions, or SQuAD 1.1 JSON.")],
    passages: Annotated[
        Path,
        typer.Option(
            "--passages", help="JSONL of the passages; of SQuAD, which holds them itself, they are written there."
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSONL of examples to write.")],
) -> None:
    """Make training examples of questions by each task's rule."""
    from collections import Counter

    from cosup.data import read_passages, read_questions, write_records
    from cosup.data.convert import convert
    from cosup.data.squad import is_squad, read_squad

    if is_squad(questions):
        if passages.exists():
            raise UserError(f"{passages} exists: the passages of {questions} would replace it; name another file")
        corpus, asked = read_squad(questions)
        write_records(passages, corpus)
    else:
        corpus, asked = list(read_passages(passages)), list(read_questions(questions))
    titles = {passage.id: passage.title for passage in corpus}
    left_out: Counter[str] = Counter()
    count = write_records(out, convert(asked, passages=titles, titles=titles, left_out=left_out))
    reasons = "".join(f"; {n:,} left out: {reason}" for reason, n in left_out.items())
    print(f"{count:,} examples in {out}{reasons}")


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


@serve_app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option("--model", help="A run folder or a model folder.")] = None,
    index: Annotated[Path | None, typer.Option("--index", help="An index folder of `cosup index build`.")] = None,
    host: Annotated[str, typer.Option(help="Address to bind; other than 127.0.0.1 needs --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    keys: Annotated[Path | None, typer.Option(help="File of API keys; see `cosup serve keys add`.")] = None,
    name: Annotated[str, typer.Option(help="The model's name, as clients see it.")] = "cosup",
    rows: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait beside them.")] = 64,
    request_seconds: Annotated[float, typer.Option(help="Longest time for a request.")] = 300.0,
    origin: Annotated[list[str] | None, typer.Option(help="A site whose pages may ask (CORS).")] = None,
) -> None:
    """Serve an OpenAI-compatible API that streams cited answers, and a page to ask it."""
    if context.invoked_subcommand is not None:
        return
    from cosup.serve import Limits
    from cosup.serve import serve as run_server
    from cosup.serve.run import check_address

    if model is None or index is None:
        raise UserError("serving needs a model and an index: cosup serve --model FOLDER --index FOLDER")
    check_address(host, keys)
    from cosup.engine import Engine, Options
    from cosup.index import FlatIndex
    from cosup.model import CoSupModel

    limits = Limits(queue=queue, request_seconds=request_seconds)
    engine = Engine(CoSupModel.load(model), FlatIndex(index), Options(rows=rows))
    print(f"serving {name} at http://{host}:{port}", flush=True)
    run_server(engine, host=host, port=port, name=name, keys_file=keys, limits=limits, origins=tuple(origin or ()))


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: Annotated[Path, typer.Option(help="The file of keys.")],
    write: Annotated[bool, typer.Option("--write", help="Also allow to add and remove passages.")] = False,
) -> None:
    """Make an API key and print it, once; the file keeps its hash."""
    from cosup.serve import add_key

    print(add_key(file, name, scopes=["read", "write"] if write else ["read"]))


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: Annotated[Path, typer.Option(help="The file of keys.")],
) -> None:
    """Remove an API key by its name."""
    from cosup.serve.keys import remove_key

    remove_key(file, name)


if __name__ == "__main__":
    main()
