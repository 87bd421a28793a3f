import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_training_benchmark_prints_every_figure_as_one_json_line(tiny_lm: Path) -> None:
    command = [sys.executable, BENCHMARKS / "train.py", "--quick", "--model", tiny_lm]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "train"
    assert set(line) == {"benchmark", "figures", "config", "hardware", "versions"}
    assert {"train_speedup", "train_speedup_same_dtype"} <= set(line["figures"])
    assert all(value > 0 for value in line["figures"].values())


def test_both_sides_of_the_training_benchmark_read_the_same_tokens(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train as benchmark  # type: ignore[import-not-found]

    from cosup.data import Evidence, Example, Passage

    corpus = {f"p{i}": Passage(f"p{i}", "gold " * (i + 1), "Title") for i in range(16)}
    examples = [Example(str(i), "squad", "What?", (Evidence(f"p{i}", "gold"),)) for i in range(16)]
    seen: dict[str, int] = {}
    collate = benchmark.plain.collate

    def counting(rows, passages, pad):  # type: ignore[no-untyped-def]
        seen["plain"] = sum(len(row[0]) for row in rows) + sum(map(len, passages))
        return collate(rows, passages, pad)

    monkeypatch.setattr(benchmark.plain, "collate", counting)
    ours = benchmark.our_side(str(tiny_lm), examples, corpus)
    benchmark.plain_side(str(tiny_lm), examples, corpus, benchmark.torch.float32).loss(0)
    assert seen["plain"] == benchmark.real_tokens(ours.model, corpus, examples)


@pytest.mark.slow
def test_the_gpu_benchmark_measures_every_side(tiny_lm: Path) -> None:
    command = [sys.executable, BENCHMARKS / "train_gpu.py", "--device", "cpu", "--models", tiny_lm]
    command += ["--batch", "2", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = {
        name.rpartition(" ")[2]: value for name, value in json.loads(done.stdout.splitlines()[-1])["figures"].items()
    }
    assert {f"{side}_tokens_per_second" for side in ("cosup", "gen", "emb", "plain", "trainer")} <= set(figures)
    assert {"utilisation", "cost_of_both", "speedup_vs_plain", "product_tflops"} <= set(figures)
    assert all(value > 0 for value in figures.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it does without a GPU")
def test_the_gpu_benchmark_says_where_it_was_not_run() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "train_gpu.py"], capture_output=True, text=True, check=True)
    assert done.stdout == "not run: there is no GPU here\n"


@pytest.mark.slow
def test_the_memory_benchmark_prints_every_figure_as_one_json_line(tiny_lm: Path) -> None:
    command = [sys.executable, BENCHMARKS / "memory.py", "--quick", "--model", tiny_lm]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "memory"
    assert {"train_memory_ratio", "cached_memory_ratio"} <= set(line["figures"])


def test_the_engine_benchmark_prints_every_figure_and_both_sides_write_the_same(tiny_lm: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_lm, tmp_path / "lm")
    config = json.loads((tiny_lm / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))  # its tokens are short
    command = [sys.executable, BENCHMARKS / "engine.py", "--quick", "--model", tmp_path / "lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "engine"
    assert set(line) == {"benchmark", "figures", "config", "hardware", "versions"}
    figures = line["figures"]
    assert {"speedup_16_rows", "speedup_1_row", "seconds_vs_generate", "search_share"} <= set(figures)
    assert all(value > 0 for value in figures.values())
    assert figures["same_text"] == figures["same_text_1_row"] == 1.0


@pytest.mark.slow
def test_the_index_benchmark_prints_every_figure_as_one_json_line(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "index.py", "--quick", "--model", tiny_folder, "--work", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "index"
    assert set(line) == {"benchmark", "figures", "config", "hardware", "versions"}
    figures = line["figures"]
    # a random model's vectors lie too close together for an approximate index to reach a recall of 0.95
    assert {"embed_vs_sentence_transformers", "overhead_vs_faiss", "hybrid_vs_flat", "bm25_seconds"} <= set(figures)
    assert "ivf-pq" in done.stdout
    assert figures["least_cosine_float32"] > 0.9999
    assert figures["least_cosine_bfloat16"] > 0.999


@pytest.mark.slow
def test_the_load_of_the_serving_benchmark_ends_without_a_failure() -> None:
    command = [sys.executable, BENCHMARKS / "serve.py", "--quick", "--clients", "24", "--seconds", "5", "--queue", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "serve"
    figures = line["figures"]
    assert [figures[name] for name in ("failed", "different", "rows_left")] == [0, 0, 0]
    assert figures["answered"] > 0
    assert figures["refused"] > 0
