"""Indexes: built, changed, looked into; and negatives found with them."""

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from cosup.cli.options import DEFAULT_MODEL, HybridOption, IndexOption, ModelOption, PassagesOption, TaskOption
from cosup.config import UserError

app = typer.Typer(help="Build and search indexes of passages.", no_args_is_help=True)


@app.command("build")
def build(
    passages: PassagesOption,
    out: Annotated[str, typer.Option(help="The index folder to write, or a milvus:// address.")],
    model: ModelOption = DEFAULT_MODEL,
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
        cited = {passage: question.id for question in read_questions(cited_by) for passage in question.gold}
        chosen = [passage for passage in source if passage.id in cited]
        found = {passage.id for passage in chosen}
        if passage := next((id for id in cited if id not in found), None):
            raise UserError(
                f"question {cited[passage]!r} of {cited_by} cites passage {passage!r}, which --passages does not hold; "
                "name the file that holds it too, or remove the citation"
            )
    embedder = ModelEmbedder(CoSupModel.load(model))
    total = source.count() if cited_by is None else len(chosen)
    threads = max(1, (os.cpu_count() or 1) // workers) if engine == "local" and workers > 1 else 0  # ray sets its own
    factory = OpenModel(model.absolute(), threads)
    options: Any = {"kind": kind, "workers": workers, "engine": engine, "factory": factory}
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


@app.command("update")
def update(
    index: IndexOption,
    passages: PassagesOption,
    model: ModelOption = DEFAULT_MODEL,
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


@app.command("add")
def add(index: IndexOption, passages: PassagesOption, model: ModelOption = DEFAULT_MODEL) -> None:
    """Add passages; one whose id is there already is replaced."""
    update(index, passages, model, keep_others=True)


@app.command("remove")
def remove(index: IndexOption, ids: Annotated[list[str], typer.Argument(help="Ids of passages.")]) -> None:
    """Remove passages by their ids."""
    from cosup.index import open_index

    opened = open_index(index)
    print(f"{opened.remove(ids):,} removed, {len(opened):,} left")


@app.command("compact")
def compact(
    index: IndexOption,
    kind: Annotated[str | None, typer.Option(help="Another kind than before; see `cosup index build`.")] = None,
) -> None:
    """Write the index anew without what was removed, as one segment."""
    from cosup.index import FaissIndex

    opened = FaissIndex(index)
    opened.compact(kind=kind)
    print(f"{len(opened):,} passages, kind {opened.manifest.kind}")


@app.command("info")
def info(index: IndexOption) -> None:
    """Say what an index is, and what made it, when, of what."""
    from cosup import terminal
    from cosup.index import open_index

    terminal.show_index(open_index(index))


@app.command("check")
def check(
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


@app.command("search")
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    index: IndexOption,
    model: ModelOption = DEFAULT_MODEL,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="How many passages.")] = 5,
    task: TaskOption = "",
    hybrid: HybridOption = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Only passages whose meta has this value: key=value; may be repeated.")
    ] = None,
) -> None:
    """Search an index with the model's state at a [Ret] put right after the prompt."""
    from cosup import terminal
    from cosup.engine import check_index, check_query
    from cosup.index import HybridIndex, open_index
    from cosup.model import CoSupModel

    opened, loaded = HybridIndex(open_index(index)), CoSupModel.load(model)
    check_index(loaded, opened)
    conditions = _conditions(where or [])
    prompt = loaded.template.prompt(query, task=task)
    check_query(loaded, prompt)
    query_1D = loaded.query([prompt])
    weight = loaded.settings.answers.hybrid if hybrid is None else hybrid
    (hits,) = opened.search(query_1D, k, where=conditions, words=[query], weight=weight)
    terminal.show_hits(hits, opened.get([hit.id for hit in hits]), query=query)
    if not hits:
        terminal.err.print("[dim](no passage was found)[/]")


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


def mine(
    examples: Annotated[Path, typer.Argument(help="JSONL of examples.")],
    index: IndexOption,
    out: Annotated[Path, typer.Option(help="JSONL of examples with negatives to write.")],
    model: ModelOption = DEFAULT_MODEL,
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
    if not asked:
        raise UserError(f"{examples} holds no examples to find negatives for")
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
