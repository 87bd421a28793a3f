"""Embedding against sentence-transformers, and searching against FAISS called directly; one part or both in one run.

    python benchmarks/index.py --model RUN [--part embed|search] [--sizes 10000 100000] [--work FOLDER] [--quick]

Embedding: the same passages (worldfacts, or --passages), weights, pooling, precision (both of --precisions in turn) and
threads; each side in turn, three rounds, the medians compared. The vectors must agree.

Searching: the embeddings of those passages, each repeated with Gaussian noise of half its length, and made unit length
again; the queries are made alike, with other noise. Indexes are built by `build_index` in --work, and kept there, so
that a second run times searches alone. Flat is FAISS on the same vectors in memory. Times are medians of single queries
and of batches of 16, k 10, two threads or --threads.

Figures: `embed_vs_sentence_transformers`, passages per second, ours over theirs; `ann_speedup_at_recall95`, the time of
flat over the time of the quickest approximate index with recall@10 of 0.95 or more, single queries, largest size;
`overhead_vs_faiss`, our flat search over FAISS's own, less one, single queries, largest size but at most 100,000;
`hybrid_vs_flat`, a flat search by state and words over one by the state alone, likewise, where the words are the
beginnings of passages, `bm25_seconds`, what it takes to make BM25 before, `bm25_again_seconds`, to have it again in
another process, and `bm25_added_milliseconds`, to count one more passage in.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from report import report

from cosup.data import Passage, read_passages
from cosup.data.worldfacts import worldfacts
from cosup.embedder import ModelEmbedder
from cosup.index import BM25, FaissIndex, HybridIndex, build_index
from cosup.index.ann import recall_of
from cosup.index.manifest import FileEntry, describe, write_manifest
from cosup.index.segment import add_structure
from cosup.index.vectors import encode, write_array
from cosup.model import CoSupModel

K, NOISE = 10, 0.5
clock = time.perf_counter  # main may choose another
AGREES: dict[str, Callable[[float, float], bool]] = {
    "float32": lambda cosine, difference: difference < 1e-5,
    "bfloat16": lambda cosine, difference: cosine >= 0.999,
}
CONFIGURATIONS = (("flat", "float32"), ("flat", "int8"), ("ivf-pq", "float32"), ("ivf-pq", "int8"), ("hnsw", "float32"))


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    arguments = parse()
    if arguments.cpu_time:
        global clock
        clock = time.process_time
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    passages = list(read_passages(arguments.passages)) if arguments.passages else worldfacts().passages
    figures: dict[str, float] = {}
    if arguments.part != "search":
        some = passages[:: max(len(passages) // arguments.count, 1)][: arguments.count]
        for precision in arguments.precisions:
            figures |= embedding(opened(arguments.model, precision), some, precision)
        name = "embed_vs_sentence_transformers"
        figures[name] = min(figures[f"{name}_{precision}"] for precision in arguments.precisions)
    if arguments.part != "embed":
        work = arguments.work or Path(tempfile.mkdtemp())
        real = real_vectors(arguments.model, passages, work)
        for size in arguments.sizes:
            figures |= searching(work, real, passages, size, arguments)
        if arguments.work is None:
            shutil.rmtree(work)
    report("index", figures, config_of(arguments), threads=arguments.threads)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--passages", type=Path)
    parser.add_argument("--part", choices=("embed", "search", "both"), default="both")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=["flat", "ivf-pq", "hnsw"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "int8"])
    parser.add_argument("--precisions", nargs="+", choices=list(AGREES), default=list(AGREES), help="of embedding")
    parser.add_argument("--only-build", action="store_true", help="the indexes to search; time them in another run")
    parser.add_argument("--count", type=int, default=512, help="passages to embed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use too; with --threads 1")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer passages, 10,000 and 50,000 vectors, no HNSW")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.count, arguments.kinds = [10_000, 50_000], 128, ["flat", "ivf-pq"]
    return arguments


# Embedding


def opened(model: Path, precision: Any) -> ModelEmbedder:
    return ModelEmbedder(CoSupModel.load(model, dtype=precision, device="cpu"))


def embedding(embedder: ModelEmbedder, passages: list[Passage], precision: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        theirs, texts = sentence_transformer(embedder.model, passages, Path(folder))
        encode = lambda: theirs.encode(texts, batch_size=32, show_progress_bar=False)  # noqa: E731
        ours: list[float] = []
        others: list[float] = []
        for _ in range(3):
            vectors, seconds = timed(lambda: embedder.embed_passages(passages))
            ours.append(seconds)
            other, seconds = timed(encode)
            others.append(seconds)
    tokens = sum(embedder.count_tokens(passages))
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(other, axis=1)
    cosine = float(((vectors * other).sum(1) / norms).min())
    difference = float(np.abs(vectors - other).max())
    for name, times in (("cosup", ours), ("sentence-transformers", others)):
        rates = [len(passages) / t for t in times]
        print(f"{name:22} {precision:8} {statistics.median(rates):7.1f} passages/s", end=" ")
        print(f"(min {min(rates):.1f}, max {max(rates):.1f})")
    print(f"{len(passages)} passages, {tokens / len(passages):.1f} tokens each; largest difference {difference:.1e}")
    assert AGREES[precision](cosine, difference), f"the two sides do not compute the same: {cosine}, {difference}"
    return {
        f"embed_vs_sentence_transformers_{precision}": statistics.median(others) / statistics.median(ours),
        f"passages_per_second_{precision}": len(passages) / statistics.median(ours),
        f"least_cosine_{precision}": cosine,
        f"largest_difference_{precision}": difference,
        "tokens_per_passage": tokens / len(passages),
    }


def sentence_transformer(model: CoSupModel, passages: Sequence[Passage], folder: Path) -> tuple[Any, list[str]]:
    """The same Emb_seq as a SentenceTransformer, and the texts that it must be given to read the same tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    template, body = model.template, model.emb
    tokenizer = template.emb_tokenizer
    chat, tokenizer.chat_template = tokenizer.chat_template, None  # else texts are taken for chat messages
    body.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = chat
    transformer = Transformer(str(folder))
    modules = [transformer, Pooling(body.config.hidden_size, pooling_mode="lasttoken")]
    if model.settings.similarity == "cosine":
        modules.append(Normalize())
    assert model.projection is None
    theirs = SentenceTransformer(modules=modules, device="cpu")
    limit = model.settings.template.max_passage_tokens
    texts = [tokenizer.decode(template.embedded(passage, max_tokens=limit)) for passage in passages]
    return theirs.to(next(body.parameters()).dtype), texts


# Searching


class Noisy:
    """Real vectors with noise, as if they were embedded: what is measured is all that follows."""

    fingerprint = "noisy"

    def __init__(self, real: np.ndarray):
        self.real, self.dim = real, real.shape[1]

    def embed_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """Vectors that depend on the ids alone."""
        numbers = np.array([int(passage.id) for passage in passages])
        return noisy(self.real[numbers % len(self.real)], seed=int(numbers[0]))


def noisy(vectors: np.ndarray, *, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(vectors.shape, np.float32)
    mixed = vectors + noise * np.float32(NOISE / np.sqrt(vectors.shape[1]))
    return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)


def real_vectors(model: Path, passages: list[Passage], work: Path) -> np.ndarray:
    path = work / "real.npy"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        np.save(path, opened(model, "float32").embed_passages(passages))
    return np.load(path)


def searching(
    work: Path, real: np.ndarray, passages: list[Passage], size: int, arguments: argparse.Namespace
) -> dict[str, float]:
    base = built(work, real, passages, size, "flat", "float32")
    chosen = [(k, d) for k, d in CONFIGURATIONS if k in arguments.kinds and d in arguments.dtypes]
    if arguments.only_build:
        for kind, dtype in chosen:
            print(cost(built(work, real, passages, size, kind, dtype), kind, dtype))
        return {}
    queries = noisy(real[:: max(len(real) // 256, 1)][:256], seed=1 << 40)
    exact, flat, figures = against_faiss(base, queries, size)
    if size <= 100_000:  # BM25 is in memory
        figures |= with_words(base, passages, queries, size)
    quickest = float("inf")
    for kind, dtype in chosen:
        index = base if (kind, dtype) == ("flat", "float32") else built(work, real, passages, size, kind, dtype)
        index.search(queries[:1], K)  # verifies and maps
        found = np.array([[int(hit.id) for hit in row] for row in index.search(queries, K)])
        recall = recall_of(found, exact)
        (ours,) = alternating(lambda q, index=index: index.search(q, K), queries=queries, rounds=3)
        print(
            f"{cost(index, kind, dtype)}\n  recall@10 {recall:.3f}  {milliseconds(ours)}  {flat / ours[0]:6.1f}x flat"
        )
        if kind != "flat" and recall >= 0.95:
            quickest = min(quickest, ours[0])
            figures["ann_speedup_at_recall95"] = figures[f"ann_speedup_at_recall95_{size}"] = flat / quickest
    return figures


def against_faiss(base: FaissIndex, queries: np.ndarray, size: int) -> tuple[np.ndarray, float, dict[str, float]]:
    """The rows that FAISS itself finds exactly, its seconds for a single query, and figures of both."""
    vectors = np.array(np.load(base.folder / base.manifest.segments[0].files["vectors"].name))
    direct = faiss.IndexFlatIP(vectors.shape[1])
    direct.add(vectors)
    del vectors
    _, exact = direct.search(queries, K)
    rounds = 3 if size <= 100_000 else 1
    times = alternating(lambda q: direct.search(q, K), lambda q: base.search(q, K), queries=queries, rounds=rounds)
    print(f"\n{size:,} vectors of {base.dim}: FAISS flat {milliseconds(times[0])}, ours {milliseconds(times[1])}")
    figures = {
        f"flat_ms_{size}": 1000 * times[0][0],
        "overhead_vs_faiss": times[1][0] / times[0][0] - 1,
        "overhead_vs_faiss_batch16": times[1][1] / times[0][1] - 1,
    }
    return exact, times[0][0], figures


def with_words(base: FaissIndex, passages: list[Passage], queries: np.ndarray, size: int) -> dict[str, float]:
    started = clock()
    BM25(list(base))
    made, hybrid = clock() - started, HybridIndex(base)
    _ = hybrid.bm25  # kept from here on, if there are many passages
    started = clock()
    other = HybridIndex(base).bm25
    again = clock() - started
    started = clock()
    for number, passage in enumerate(passages[:100]):
        other.add([replace(passage, id=f"new {number}")])
    added = (clock() - started) / 100
    words = [" ".join(f"{p.title} {p.text}".split()[:12]) for p in passages[:16]]
    both = lambda q: hybrid.search(q, K, words=words[: len(q)], weight=0.2)  # noqa: E731
    alone, times = alternating(lambda q: base.search(q, K), both, queries=queries, rounds=3)
    print(
        f"  by state and words {milliseconds(times)}, by the state {milliseconds(alone)}; BM25 made in {made:.1f} s, "
        f"had again in {again:.2f} s, one more passage counted in in {1000 * added:.2f} ms"
    )
    return {
        f"bm25_seconds_{size}": made,
        "bm25_seconds": made,
        "bm25_again_seconds": again,
        "bm25_added_milliseconds": 1000 * added,
        "hybrid_vs_flat": times[0] / alone[0],
    }


def built(work: Path, real: np.ndarray, passages: list[Passage], size: int, kind: str, dtype: Any) -> FaissIndex:
    """An index in its folder, built there if it is not."""
    folder = work / f"{size}-{kind}-{dtype}"
    if not (folder / "index.json").exists():
        like = {"kind": "flat", "dtype": dtype} if kind != "flat" else {"kind": "flat", "dtype": "float32"}
        start_from = None if (kind, dtype) == ("flat", "float32") else built(work, real, passages, size, **like)
        started = time.perf_counter(), time.process_time()
        if start_from is None:
            build_index(corpus(passages, size), Noisy(real), folder, kind="flat")
        elif kind == "flat":
            recoded(start_from, folder, dtype)
        else:
            with_structure(start_from, folder, kind)
        spent = time.perf_counter() - started[0], time.process_time() - started[1]
        (work / f"{folder.name}.seconds").write_text(f"{spent[0]} {spent[1]}")
    return FaissIndex(folder)


def recoded(flat: FaissIndex, folder: Path, dtype: Any) -> None:
    """A folder that shares a flat one's passages and lookups, and has its vectors in another type."""
    (entry,) = flat.manifest.segments
    shared = {role: file for role, file in entry.files.items() if role != "vectors"}
    linked(flat.folder, folder, shared.values())
    vectors = np.load(flat.folder / entry.files["vectors"].name, mmap_mode="r")
    starts = range(0, len(vectors), 1 << 14)
    parts = [("vectors", 0), *([("scales", 1)] if dtype == "int8" else [])]
    for role, place in parts:
        blocks = (encode(vectors[start : start + (1 << 14)], dtype)[place] for start in starts)
        write_array(folder / f"{role}-0.npy", blocks, count=len(vectors))
        shared[role] = describe(folder / f"{role}-0.npy")
    update = {"segments": [entry.model_copy(update={"files": shared})], "dtype": dtype}
    write_manifest(folder, flat.manifest.model_copy(update=update))


def with_structure(flat: FaissIndex, folder: Path, kind: str) -> None:
    """A folder that shares a flat one's files, and has a FAISS structure beside them."""
    linked(flat.folder, folder, flat.manifest.files())
    (entry,) = flat.manifest.segments
    threads = faiss.omp_get_max_threads()
    entry = add_structure(folder, 0, entry, flat.dim, kind=kind, graph_threads=threads)
    write_manifest(folder, flat.manifest.model_copy(update={"segments": [entry], "kind": kind}))


def linked(folder: Path, other: Path, files: Iterable[FileEntry]) -> None:
    """Files of an index never change, so that two may share them."""
    other.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (other / file.name).exists():
            os.link(folder / file.name, other / file.name)


def corpus(passages: list[Passage], size: int) -> Iterator[Passage]:
    for number in range(size):
        passage = passages[number % len(passages)]
        meta = {"source": f"s{number % 10}"}
        yield Passage(str(number), f"{passage.text} (copy {number})", passage.title, meta)


def alternating(*calls: Callable[[Any], Any], queries: np.ndarray, rounds: int) -> list[list[float]]:
    """Seconds of a single query and of a batch of 16, medians, for each of the calls in turn."""
    medians: list[list[float]] = [[] for _ in calls]
    for step, count in ((1, 16 * rounds), (16, 4 * rounds)):
        seconds: list[list[float]] = [[] for _ in calls]
        for start in range(0, count * step, step):
            batch = np.ascontiguousarray(queries[[i % len(queries) for i in range(start, start + step)]])
            for call, own in zip(calls, seconds, strict=True):
                own.append(timed(lambda call=call, batch=batch: call(batch))[1])
        for own, median in zip(seconds, medians, strict=True):
            median.append(statistics.median(own))
    return medians


def cost(index: FaissIndex, kind: str, dtype: str) -> str:
    """What it took to build (beyond the index whose files it shares), and what it takes to keep."""
    disk = sum(file.bytes for file in index.manifest.files()) / 1e6
    seconds, cpu = map(float, (index.folder.parent / f"{index.folder.name}.seconds").read_text().split())
    opened, anonymous, resident = in_a_fresh_process(index.folder)
    return (
        f"{kind:7} {dtype:8} build {seconds:6.1f} s ({cpu:.1f} s of CPU)  disk {disk:8.1f} MB  opens in "
        f"{opened * 1000:.0f} ms, private {anonymous:+.1f} MB, resident after a search {resident:+.1f} MB"
    )


_PROBE = """
import sys, time
import numpy as np
from cosup.index import FaissIndex
def memory(what):
    return int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1]) / 1024
private, resident = memory("RssAnon"), memory("VmRSS")
started = time.perf_counter()
index = FaissIndex(sys.argv[1])
opened = time.perf_counter() - started
private = memory("RssAnon") - private
index.search(np.ones((1, index.dim), np.float32), 10)
print(opened, private, memory("VmRSS") - resident)
"""


def in_a_fresh_process(folder: Path) -> list[float]:
    """Seconds to open, MB of private memory that this costs, and MB resident (mapped files too) after one search."""
    done = subprocess.run([sys.executable, "-c", _PROBE, str(folder)], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def milliseconds(times: list[float]) -> str:
    return f"{1000 * times[0]:7.2f} ms single {1000 * times[1]:8.2f} ms for 16"


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = clock()
    result = call()
    return result, clock() - started


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "model": arguments.model.name,
        "part": arguments.part,
        "sizes": arguments.sizes,
        "count": arguments.count,
        "noise": NOISE,
        "k": K,
        "precisions": arguments.precisions,
        "kinds": arguments.kinds,
        "dtypes": arguments.dtypes,
        "quick": arguments.quick,
        "clock": "cpu" if arguments.cpu_time else "wall",
    }


if __name__ == "__main__":
    main()
