"""Building an index: passages go in, an embedder turns them into vectors, shard by shard, and a folder comes out.

What is done is kept: a build that was killed goes on from its last whole shard when it is started again, and an index
that is there stays readable until the new one takes its place.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from cosup.config import UserError
from cosup.data import Passage
from cosup.index import ann
from cosup.index.folder import BUILDING, FaissIndex, drop_building, note, publish, write_aliases, writing
from cosup.index.manifest import MANIFEST, Dtype, Manifest, read_manifest
from cosup.index.prepare import Prepared
from cosup.index.protocol import Embedder, EmbedderFactory, Index, MeasuringEmbedder, Vectors
from cosup.index.segment import add_structure, write_segment
from cosup.index.shards import ShardStore, embed_shard, is_done, plan_shards, read_passages, read_vectors
from cosup.index.vectors import decode

Engine = Literal["local", "ray"]
Progress = Callable[[int], None]


def build_index(
    passages: Iterable[Passage],
    embedder: Embedder,
    out: Path,
    *,
    kind: str = "auto",
    dtype: Dtype = "float32",
    workers: int = 1,
    engine: Engine = "local",
    factory: EmbedderFactory | None = None,
    shards: str | None = None,
    total: int | None = None,
    graph_threads: int = 1,
    origin: str = "",
    on_progress: Progress = lambda done: None,
) -> FaissIndex:
    """Embeds passages and writes an index, in the place of what was there; goes on with a build that was interrupted.

    Args:
        passages: with distinct ids; the same ones, in the same order, where a build is to go on.
        embedder: the model. One that can measure (`MeasuringEmbedder`) has long passages split on sentences.
        out: the index folder.
        kind: `flat` (exact), `hnsw`, `ivf-pq`, any FAISS factory string, or `auto`, which chooses by size.
        dtype: how vectors are stored: `float32`, `float16` or `int8`.
        workers: how many processes embed; with more than one, each makes its own embedder by `factory`.
        engine: `local`, or `ray` for a Ray cluster (`pip install 'cosup[ray]'`).
        factory: makes a worker's embedder; picklable.
        shards: where shards are kept meanwhile, for workers on other machines: a shared folder or an object store.
        total: how many passages there are, if known: the disk is checked before the work begins.
        graph_threads: threads that build an HNSW graph; with more than one, two builds are not the same byte for byte.
        origin: where the passages come from, for the history.
        on_progress: is told how many passages are done.

    Raises:
        UserError: there are no passages, two have one id, the folder is something else or somebody else writes to it,
            FAISS has no such kind, or the disk is full or too small.
    """
    out = Path(out)
    ann.refuse_unknown(kind, embedder.dim)
    _refuse_foreign(out)
    _refuse_small_disk(out, total, embedder.dim, dtype)
    with writing(out):
        prepared = Prepared(passages, embedder)
        store = ShardStore(shards or str(out / BUILDING))
        counts = _embed(store, prepared, embedder, dtype, workers, engine, factory, on_progress)
        if sum(counts):
            manifest = _assemble(out, store, counts, prepared, embedder, kind, dtype, graph_threads)
            publish(out, manifest)
        store.delete()
        drop_building(out)
    if not sum(counts):
        _drop_empty(out)
        raise UserError("the corpus is empty: name a file with at least one passage")
    note(out, "built", passages=manifest.count, kind=manifest.kind, dtype=dtype, origin=origin, split=prepared.split,
         duplicates=len(prepared.aliases), embedder=embedder.fingerprint)  # fmt: skip
    return FaissIndex(out)


def build_collection(
    passages: Iterable[Passage],
    embedder: Embedder,
    url: str,
    *,
    kind: str = "auto",
    workers: int = 1,
    engine: Engine = "local",
    factory: EmbedderFactory | None = None,
    shards: str,
    on_progress: Progress = lambda done: None,
) -> Index:
    """As `build_index`, into Milvus; vectors are kept there as fp32, by the structure that Milvus makes of them.

    Args:
        passages, embedder, workers, engine, factory, on_progress: see `build_index`.
        url: see `cosup.index.milvus.MilvusIndex`.
        kind: see `cosup.index.milvus.build_milvus`.
        shards: where shards are kept meanwhile: a folder, or an object store.

    Raises:
        UserError: as `build_index`, or Milvus can't be reached.
    """
    from cosup.index.milvus import build_milvus

    store = ShardStore(shards)

    def embed(prepared: Prepared) -> Iterator[tuple[Passage, Vectors]]:
        number = len(_embed(store, prepared, embedder, "float32", workers, engine, factory, on_progress))
        vectors = chain.from_iterable(decode(*block) for block in read_vectors(store, number))
        return zip(read_passages(store, number), vectors, strict=True)

    index = build_milvus(passages, embedder, url, embed, kind=kind)
    store.delete()
    return index


def _embed(
    store: ShardStore,
    prepared: Prepared,
    embedder: Embedder,
    dtype: Dtype,
    workers: int,
    engine: Engine,
    factory: EmbedderFactory | None,
    on_progress: Progress,
) -> list[int]:
    """Sees to it that every shard has its vectors. Returns the count of each."""
    planned = plan_shards(store, prepared, fingerprint=embedder.fingerprint, dtype=dtype)
    if workers == 1 and engine == "local":
        counts: list[int] = []
        for number, count in enumerate(planned):
            if not is_done(store, number):
                embed_shard(store, number, embedder, dtype=dtype)
            counts.append(count)
            on_progress(sum(counts))
        return counts
    if factory is None:
        raise ValueError("workers need a factory that makes their embedders")
    counts = list(planned)
    waiting = [number for number in range(len(counts)) if not is_done(store, number)]
    done = sum(counts) - sum(counts[number] for number in waiting)
    on_progress(done)
    if engine == "ray":
        from cosup.index.on_ray import embed_shards
    else:
        from cosup.index.processes import embed_shards
    for count in embed_shards(store.place, waiting, factory, dtype=dtype, workers=workers):
        done += count
        on_progress(done)
    return counts


def _assemble(
    out: Path,
    store: ShardStore,
    counts: list[int],
    prepared: Prepared,
    embedder: Embedder,
    kind: str,
    dtype: Dtype,
    graph_threads: int,
) -> Manifest:
    """Writes the files of the next generation; nothing names them yet."""
    generation, count, number = 0, sum(counts), len(counts)
    if (out / MANIFEST).is_file():
        generation = _generation(out) + 1
    chosen = ann.choose(kind, count)
    entry = write_segment(
        out, generation, lambda: read_passages(store, number), lambda: read_vectors(store, number), count=count
    )
    if chosen != "flat":
        entry = add_structure(out, generation, entry, embedder.dim, kind=chosen, graph_threads=graph_threads)
    return Manifest(
        kind=chosen,
        fingerprint=embedder.fingerprint,
        layout=dict(embedder.layout) if isinstance(embedder, MeasuringEmbedder) else {},
        dim=embedder.dim,
        dtype=dtype,
        count=count,
        generation=generation,
        segments=[entry],
        aliases=write_aliases(out, generation, prepared.aliases),
    )


def _generation(out: Path) -> int:
    try:
        return read_manifest(out).generation
    except UserError:  # damaged, or of another version: it is replaced, and must not be overwritten before
        names = (path.stem.rpartition("-")[2] for path in out.iterdir())
        return max((int(name) for name in names if name.isdigit()), default=0)


def _refuse_foreign(out: Path) -> None:
    ours = (out / MANIFEST).is_file() or (out / BUILDING).is_dir()
    left = set() if not out.is_dir() else {path.name for path in out.iterdir()} - {"lock"}
    if out.exists() and not ours and (not out.is_dir() or left):
        raise UserError(f"{out} exists and has no {MANIFEST}, so it is not ours to replace; name another folder")


def disk_needed(count: int, dim: int, dtype: Dtype, *, text_bytes: int = 1000) -> int:
    """Bytes that a build needs while it runs: its shards, and beside them the index.

    Args:
        count: passages.
        dim: D.
        dtype: of the vectors.
        text_bytes: of a passage with its title and meta.
    """
    width = {"float32": 4, "float16": 2, "int8": 1}[dtype]
    return count * (2 * dim * width + 2 * text_bytes + 64)


def _refuse_small_disk(out: Path, total: int | None, dim: int, dtype: Dtype) -> None:
    if total is None:
        return
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    needed, free = disk_needed(total, dim, dtype), shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{total:,} passages need about {needed / 1e9:,.1f} GB of disk at {out} while the index is built, and "
            f"{free / 1e9:,.1f} GB are free; make room, or store vectors as float16 or int8"
        )


def _drop_empty(out: Path) -> None:
    """Removes a folder that holds nothing but the lock."""
    if {path.name for path in out.iterdir()} <= {"lock"}:
        shutil.rmtree(out)
