"""The command line: parse, call, print. Whatever is slow to import is imported inside the commands."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

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

_MANY = 200  # questions for which compiling a model first is worth the quarter of a minute that it takes


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


PassagesOption = Annotated[
    list[str],
    typer.Option("--passages", help="JSONL, Parquet, a folder of Parquet, or hf:NAME[:SPLIT]; may be repeated."),
]


@index_app.command("build")
def index_build(
    model: ModelOption,
    passages: PassagesOption,
    out: Annotated[str, typer.Option(help="The index folder to write, or a milvus:// address.")],
    cited_by: Annotated[
        Path | None, typer.Option(help="Only the passages that are gold for a question of this JSONL file.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="flat (exact), hnsw, ivf-pq, a FAISS factory string, or auto, by size.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the stored vectors: float32, float16 or int8.")] = "float32",
    workers: Annotated[int, typer.Option(min=1, help="Processes, or Ray actors, that embed.")] = 1,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    shards: Annotated[
        str | None, typer.Option(help="Where shards are kept meanwhile; a shared folder or s3://, for a cluster.")
    ] = None,
    graph_threads: Annotated[
        int, typer.Option(min=1, help="Threads that build an HNSW graph; above 1, two builds differ.")
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.")] = False,
) -> None:
    """Embed passages and write an index; an interrupted build goes on when it is run again."""
    from cosup import terminal
    from cosup.data import read_questions
    from cosup.embedder import ModelEmbedder, OpenModel
    from cosup.index import Source, build_collection, build_index, estimate_build
    from cosup.model import CoSupModel

    logging.getLogger("cosup.index").setLevel(logging.INFO)
    if dtype not in ("float32", "float16", "int8"):
        raise UserError(f"--dtype is {dtype!r}, and must be float32, float16 or int8")
    if engine not in ("local", "ray"):
        raise UserError(f"--engine is {engine!r}, and must be local or ray")
    source = Source(passages)
    chosen: Any = source
    if cited_by is not None:
        cited = {passage for question in read_questions(cited_by) for passage in question.gold}
        chosen = [passage for passage in source if passage.id in cited]
    embedder = ModelEmbedder(CoSupModel.load(model))
    total = source.count() if cited_by is None else len(chosen)
    options: Any = {"kind": kind, "workers": workers, "engine": engine, "factory": OpenModel(model.absolute())}
    if dry_run:
        terminal.show_estimate(estimate_build(chosen, embedder, Path(out), kind=kind, dtype=dtype), workers)  # type: ignore[arg-type]
        return
    with terminal.counting("indexing", total, unit="passages") as on_progress:
        if out.startswith("milvus:"):
            place = shards or out.rpartition("/")[2] + ".building"
            build_collection(chosen, embedder, out, shards=place, on_progress=on_progress, **options)
        else:
            options |= {"dtype": dtype, "shards": shards, "total": total, "graph_threads": graph_threads}
            build_index(chosen, embedder, Path(out), origin=" ".join(passages), on_progress=on_progress, **options)
    terminal.out.print(f"saved: {out}", soft_wrap=True)


@index_app.command("update")
def index_update(
    index: IndexOption,
    model: ModelOption,
    passages: PassagesOption,
    keep_others: Annotated[bool, typer.Option("--keep-others", help="Only add and replace; remove nothing.")] = False,
) -> None:
    """Make an index hold these passages, embedding only those that are new or changed."""
    from cosup import terminal
    from cosup.embedder import ModelEmbedder
    from cosup.index import FaissIndex, Source, update_index
    from cosup.model import CoSupModel

    opened, embedder = FaissIndex(index), ModelEmbedder(CoSupModel.load(model))
    with terminal.counting("embedding", None, unit="passages") as on_progress:
        done = update_index(opened, Source(passages), embedder, remove_others=not keep_others, on_progress=on_progress)
    terminal.out.print(
        f"{done.added:,} added, {done.changed:,} changed, {done.described_anew:,} with other meta alone, "
        f"{done.removed:,} removed, {done.unchanged:,} unchanged; {len(opened):,} passages in {index}",
        soft_wrap=True,
    )


@index_app.command("add")
def index_add(index: IndexOption, model: ModelOption, passages: PassagesOption) -> None:
    """Add passages; one whose id is there already is replaced."""
    index_update(index, model, passages, keep_others=True)


@index_app.command("remove")
def index_remove(index: IndexOption, ids: Annotated[list[str], typer.Argument(help="Ids of passages.")]) -> None:
    """Remove passages by their ids."""
    from cosup.index import open_index

    opened = open_index(index)
    print(f"{opened.remove(ids):,} removed, {len(opened):,} left")


@index_app.command("compact")
def index_compact(
    index: IndexOption,
    kind: Annotated[str | None, typer.Option(help="Another kind than before; see `cosup index build`.")] = None,
) -> None:
    """Write the index anew without what was removed, as one segment."""
    from cosup.index import FaissIndex

    opened = FaissIndex(index)
    opened.compact(kind=kind)
    print(f"{len(opened):,} passages, kind {opened.manifest.kind}")


@index_app.command("info")
def index_info(index: IndexOption) -> None:
    """Say what an index is, and what made it, when, of what."""
    from cosup import terminal
    from cosup.index import open_index

    terminal.show_index(open_index(index))


@index_app.command("check")
def index_check(
    index: IndexOption,
    model: Annotated[Path | None, typer.Option("--model", help="Embed a sample again with this model.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="How many passages are embedded again.")] = 64,
) -> None:
    """Verify every checksum, and a sample of the vectors against the model."""
    from cosup.index import FaissIndex, check_index

    opened, embedder = FaissIndex(index), None
    if model is not None:
        from cosup.embedder import ModelEmbedder
        from cosup.model import CoSupModel

        embedder = ModelEmbedder(CoSupModel.load(model))
    found = check_index(opened, embedder, sample=sample)
    print(f"{found.files} files, {found.bytes / 1e6:,.1f} MB: every checksum is right")
    if found.sampled:
        print(f"{found.sampled} passages embedded again: cosine with the stored vectors >= {found.least_cosine:.6f}")


@index_app.command("search")
def index_search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    index: IndexOption,
    model: ModelOption,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="How many passages.")] = 5,
    task: TaskOption = "",
    where: Annotated[
        list[str] | None, typer.Option(help="Only passages whose meta has this value: key=value; may be repeated.")
    ] = None,
) -> None:
    """Search an index with the model's state at a [Ret] put right after the prompt."""
    from cosup import terminal
    from cosup.engine import check_index
    from cosup.index import open_index
    from cosup.model import CoSupModel

    opened, loaded = open_index(index), CoSupModel.load(model)
    check_index(loaded, opened)
    conditions = _conditions(where or [])
    (hits,) = opened.search(loaded.query([loaded.template.prompt(query, task=task)]), k, where=conditions)
    terminal.show_hits(hits, opened.get([hit.id for hit in hits]), query=query)


def _conditions(where: list[str]) -> dict[str, Any] | None:
    conditions: dict[str, Any] = {}
    for condition in where:
        key, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"--where is {condition!r}, and must be key=value")
        try:
            conditions[key] = json.loads(value)
        except ValueError:
            conditions[key] = value
    return conditions or None


@app.command()
def mine(
    examples: Annotated[Path, typer.Argument(help="JSONL of examples.")],
    model: ModelOption,
    index: IndexOption,
    out: Annotated[Path, typer.Option(help="JSONL of examples with negatives to write.")],
    count: Annotated[int, typer.Option(min=1, help="Most negatives of a retrieval.")] = 8,
    first_rank: Annotated[int, typer.Option(min=1, help="The first rank that is looked at.")] = 1,
    last_rank: Annotated[int, typer.Option(min=1, help="The last rank that is looked at.")] = 100,
    margin: Annotated[float, typer.Option(help="A negative scores at least so much less than the gold.")] = 0.0,
) -> None:
    """Find hard negatives with the current model, in each example's own context."""
    from cosup import terminal
    from cosup.data import read_examples, write_records
    from cosup.embedder import ContextQueries
    from cosup.engine import check_index
    from cosup.index import Mined, Rules, open_index
    from cosup.index import mine as mine_negatives
    from cosup.model import CoSupModel

    asked = list(read_examples(examples))
    opened, loaded = open_index(index), CoSupModel.load(model)
    check_index(loaded, opened)
    rules, counts = Rules(count, (first_rank, last_rank), margin), Mined()
    with terminal.counting("mining", len(asked), unit="examples") as on_progress:
        mined = mine_negatives(asked, opened, ContextQueries(loaded, opened), rules=rules, counts=counts)
        write_records(out, terminal.counted(mined, on_progress))
    terminal.out.print(
        f"{counts.negatives:,} negatives for {counts.retrievals:,} retrievals, {counts.without:,} without any; "
        f"saved: {out}",
        soft_wrap=True,
    )


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
    from cosup.index import open_index
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
    opened, loaded = open_index(index), CoSupModel.load(model)
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
    from cosup.index import open_index
    from cosup.model import CoSupModel, compile_layers

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
    opened, loaded = open_index(index), CoSupModel.load(model)
    compile_layers(loaded, "auto" if len(asked) >= _MANY else False)
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
    from cosup.index import open_index
    from cosup.model import CoSupModel, compile_layers

    options = Options(max_new_tokens=max_new_tokens)
    settings = RunSettings(mode, not whole_corpus, options, name=name, mauve_model=mauve)  # type: ignore[arg-type]
    asked = read_tasks(tasks or [], data=data, limit=limit)
    place = out or model / "evaluations"
    if fresh:
        remove_run(place)
    judge = HuggingFaceNli(nli) if nli else None
    opened, loaded = open_index(index), CoSupModel.load(model)
    compile_layers(loaded, "auto" if sum(len(task.questions) for task in asked) >= _MANY else False)
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
    paths: Annotated[list[Path], typer.Argument(help=".txt, .md, .html, .pdf, .jsonl files, or folders of them.")],
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
    from cosup.index import FaissIndex
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
    model, index = CoSupModel.load(steps.run), FaissIndex(out / "index")
    engine = Engine(model, index, OPTIONS)
    for question in steps.shown():
        terminal.show_question(question.question)
        terminal.show_answer(engine.stream(model.template.prompt(question.question, task=question.task)), index.get)
    terminal.show_next_steps(out)


@serve_app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option("--model", help="A run folder or a model folder.")] = None,
    index: Annotated[str | None, typer.Option("--index", help="An index folder, or a milvus:// address.")] = None,
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
    from cosup.index import open_index
    from cosup.model import CoSupModel

    limits = Limits(queue=queue, request_seconds=request_seconds)
    engine = Engine(CoSupModel.load(model), open_index(index), Options(rows=rows))
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
