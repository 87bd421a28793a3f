"""Embedding against sentence-transformers, and searching against FAISS called directly; one part or both in one run.

    python benchmarks/index.py --model RUN [--part embed|search] [--sizes 10000 100000] [--work FOLDER] [--quick]

Embedding: the same passages (worldfacts, or --passages), weights, pooling, precision (float32) and threads; each side
in turn, three rounds, the medians compared. The vectors must agree.

Searching: the embeddings of those passages, each repeated with Gaussian noise of half its length, and made unit length
again; the queries are made alike, with other noise. Indexes are built by `build_index` in --work, and kept there, so
that a second run times searches alone. Flat is FAISS on the same vectors in memory. Times are medians of single queries
and of batches of 16, k 10, two threads or --threads.

Figures: `embed_vs_sentence_transformers`, passages per second, ours over theirs; `ann_speedup_at_recall95`, the time of
flat over the time of the quickest approximate index with recall@10 of 0.95 or more, single queries, largest size;
`overhead_vs_faiss`, our flat search over FAISS's own, less one, single queries, largest size but at most 100,000.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from report import report

from cosup.data import Passage, read_passages
from cosup.data.worldfacts import worldfacts
from cosup.embedder import ModelEmbedder
from cosup.index import FaissIndex, build_index
from cosup.index.ann import recall_of
from cosup.model import CoSupModel

K, NOISE = 10, 0.5
clock = time.perf_counter  # main may choose another
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
    embedder = ModelEmbedder(CoSupModel.load(arguments.model, dtype="float32", device="cpu"))
    if arguments.part != "search":
        figures |= embedding(embedder, passages[:: max(len(passages) // arguments.count, 1)][: arguments.count])
    if arguments.part != "embed":
        work = arguments.work or Path(tempfile.mkdtemp())
        real = real_vectors(embedder, passages, work)
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


def embedding(embedder: ModelEmbedder, passages: list[Passage]) -> dict[str, float]:
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
    cosine = float((vectors * other).sum(1).min())
    difference = float(np.abs(vectors - other).max())
    for name, times in (("cosup", ours), ("sentence-transformers", others)):
        rates = [len(passages) / t for t in times]
        print(f"{name:22} {statistics.median(rates):7.1f} passages/s (min {min(rates):.1f}, max {max(rates):.1f})")
    print(f"{len(passages)} passages, {tokens / len(passages):.1f} tokens each; largest difference {difference:.1e}")
    assert difference < 1e-4, "the two sides do not compute the same"
    return {
        "embed_vs_sentence_transformers": statistics.median(others) / statistics.median(ours),
        "passages_per_second": len(passages) / statistics.median(ours),
        "tokens_per_passage": tokens / len(passages),
        "least_cosine": cosine,
        "largest_difference": difference,
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
    return theirs.float(), texts


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


def real_vectors(embedder: ModelEmbedder, passages: list[Passage], work: Path) -> np.ndarray:
    path = work / "real.npy"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        np.save(path, embedder.embed_passages(passages))
    return np.load(path)


def searching(
    work: Path, real: np.ndarray, passages: list[Passage], size: int, arguments: argparse.Namespace
) -> dict[str, float]:
    queries = noisy(real[:: max(len(real) // 256, 1)][:256], seed=1 << 40)
    figures: dict[str, float] = {}
    base = built(work, real, passages, size, "flat", "float32")
    vectors = np.array(np.load(base.folder / base.manifest.segments[0].files["vectors"].name))
    direct = faiss.IndexFlatIP(vectors.shape[1])
    direct.add(vectors)
    del vectors
    _, exact = direct.search(queries, K)
    times = alternating(lambda q: direct.search(q, K), lambda q: base.search(q, K), queries=queries, rounds=3)
    print(f"\n{size:,} vectors of {real.shape[1]}: FAISS flat {milliseconds(times[0])}, ours {milliseconds(times[1])}")
    figures[f"flat_ms_{size}"] = 1000 * times[0][0]
    if size <= 100_000:
        figures["overhead_vs_faiss"] = times[1][0] / times[0][0] - 1
        figures["overhead_vs_faiss_batch16"] = times[1][1] / times[0][1] - 1
    flat, quickest = times[0], float("inf")
    for kind, dtype in CONFIGURATIONS:
        if kind not in arguments.kinds or dtype not in arguments.dtypes:
            continue
        if size > 100_000 and (dtype == "int8" or kind == "hnsw"):
            continue  # they would take longer than all else together
        index = base if (kind, dtype) == ("flat", "float32") else built(work, real, passages, size, kind, dtype)
        index.search(queries[:1], K)  # verifies and maps
        found = np.array([[int(hit.id) for hit in row] for row in index.search(queries, K)])
        recall = recall_of(found, exact)
        (ours,) = alternating(lambda q, index=index: index.search(q, K), queries=queries, rounds=3)
        print(line(index, kind, dtype, recall, ours, flat))
        if kind != "flat" and recall >= 0.95:
            quickest = min(quickest, ours[0])
            figures["ann_speedup_at_recall95"] = flat[0] / quickest
    return figures


def built(work: Path, real: np.ndarray, passages: list[Passage], size: int, kind: str, dtype: Any) -> FaissIndex:
    folder = work / f"{size}-{kind}-{dtype}"
    if not (folder / "index.json").exists():
        started = time.perf_counter()
        build_index(
            corpus(passages, size),
            Noisy(real),
            folder,
            kind=kind,
            dtype=dtype,
            graph_threads=faiss.omp_get_max_threads(),
        )
        (folder.parent / f"{folder.name}.seconds").write_text(str(time.perf_counter() - started))
    return FaissIndex(folder)


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


def line(index: FaissIndex, kind: str, dtype: str, recall: float, ours: list[float], flat: list[float]) -> str:
    disk = sum(file.bytes for file in index.manifest.files()) / 1e6
    seconds = float((index.folder.parent / f"{index.folder.name}.seconds").read_text())
    opened, anonymous, resident = in_a_fresh_process(index.folder)
    return (
        f"{kind:7} {dtype:8} recall@10 {recall:.3f}  {milliseconds(ours)}  {flat[0] / ours[0]:6.1f}x flat  "
        f"build {seconds:6.1f} s  disk {disk:8.1f} MB  opens in {opened * 1000:.0f} ms, "
        f"private {anonymous:+.1f} MB, resident after a search {resident:+.1f} MB"
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
        "dtype": "float32",
        "quick": arguments.quick,
        "clock": "cpu" if arguments.cpu_time else "wall",
    }


if __name__ == "__main__":
    main()
