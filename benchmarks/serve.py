"""What the server costs over the engine, and what it bears: same model, same questions, one run.

    python benchmarks/serve.py [--quick] [--model RUN --index INDEX] [--turns 6]
    python benchmarks/serve.py [--quick] [--model RUN --index INDEX] --clients 64 --seconds 120

Without --model, an untrained model: SmolLM2-135M, or with --quick a random Llama of two layers. The index then holds
passages of the built-in worldfacts. The server is `cosup serve` in a process of its own, with 16 rows; its clients are
in this one, on the same cores. Every answer begins with a retrieval and has at most --tokens tokens.

Without --clients: 16 streams against `Engine.generate` with 16 rows, in turns. `serve_overhead` is the share of the
engine's tokens per second that is lost (0.1: a tenth); the clients' own work, on the same cores, is in it.
`serve_overhead_cpu` leaves them out: CPU time of the server's process for a token over the engine's, less 1.

With --clients: so many ask without a pause, every second request a stream; every tenth is broken off after its first
event. Figures: `failed`, requests that ended neither well nor with
an honest 429; `refused`, those 429s; `different`, answers that are not the engine's own for this question, asked alone;
`rows_left`, rows and places of the queue in use at the end; `memory_growth`, the largest resident size of the last
quarter of the time over that of the second, less 1.
"""

import argparse
import asyncio
import json
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cosup.config import ModelSection
from cosup.data.worldfacts import worldfacts
from cosup.engine import Engine, Options
from cosup.index import build_index, open_index
from cosup.model import CoSupModel

ROWS, PASSAGES, QUESTIONS = 16, 200, 48
Seen = tuple[str, tuple[tuple[str, int, int], ...]]


def main() -> None:
    arguments = parse()
    count = QUESTIONS if arguments.clients else ROWS * (1 + arguments.turns)
    questions = [question.question for question in worldfacts().test[:count]]
    with tempfile.TemporaryDirectory() as folder:
        model, index = arguments.model, arguments.index
        if model is None:
            model, index = make(Path(folder), quick=arguments.quick)
        engine = Engine(CoSupModel.load(model, dtype=arguments.dtype), open_index(str(index)), Options(rows=ROWS))
        measure = overhead if arguments.clients is None else load
        figures = asyncio.run(measure(arguments, engine, model, index, questions))
    for name, value in figures.items():
        print(f"{name:28} {value:12.4f}")
    report(arguments, engine, figures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--model", type=Path, help="a run folder; needs --index")
    parser.add_argument("--index", type=Path, help="an index that this model built")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of both sides")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--turns", type=int, default=6, help="how often each side answers 16 questions, after one more")
    parser.add_argument("--clients", type=int, help="how many ask at once: measures what the server bears")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long they ask")
    parser.add_argument("--queue", type=int, default=32, help="of the server, while clients are counted")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.index is None):
        parser.error("--model and --index go together")
    return arguments


def make(folder: Path, *, quick: bool) -> tuple[Path, Path]:
    """An untrained model and its index."""
    name = str(tiny(folder / "llama")) if quick else "smollm2-135m"
    CoSupModel.start(ModelSection(gen=name)).save(folder / "model")
    build_index(worldfacts().passages[:PASSAGES], CoSupModel.load(folder / "model"), folder / "index")
    return folder / "model", folder / "index"


def tiny(folder: Path) -> Path:
    """A random Llama of two layers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator([passage.text for passage in worldfacts().passages[:PASSAGES]], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": fast.eos_token_id, "pad_token_id": fast.eos_token_id}
    config = transformers.LlamaConfig(vocab_size=len(fast), **sizes, **ids, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@asynccontextmanager
async def server(
    model: Path, index: Path, queue: int, dtype: str
) -> AsyncIterator[tuple[httpx.AsyncClient, psutil.Process]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cosup.cli", "serve", "--model", str(model), "--index", str(index)]
    command += ["--port", str(port), "--rows", str(ROWS), "--queue", str(queue), "--dtype", dtype]
    limits = httpx.Limits(max_connections=None)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - read where the server does not start
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits) as http:
            while process.poll() is None and not await ready(http):
                await asyncio.sleep(0.2)
            if process.poll() is not None:
                log.seek(0)
                sys.exit(f"the server did not start: {log.read().decode()}")
            yield http, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


async def ready(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/readyz")).status_code == 200
    except httpx.TransportError:
        return False


def body(question: str, tokens: int, *, stream: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "cosup", "messages": [{"role": "user", "content": question}]}
    asked |= {"max_tokens": tokens, "cosup": {"retrieve_first": True}, "stream": stream}
    return asked | ({"stream_options": {"include_usage": True}} if stream else {})


async def overhead(
    arguments: argparse.Namespace, engine: Engine, model: Path, index: Path, questions: Sequence[str]
) -> dict[str, float]:
    """Turn by turn, so that a machine that slows down does so for both sides."""
    options = Options(max_new_tokens=arguments.tokens, retrieve_first=True)
    spent, cpu, written = ({"engine": 0.0, "server": 0.0} for _ in range(3))
    async with server(model, index, 64, arguments.dtype) as (http, process):
        processes = {"engine": psutil.Process(), "server": process}

        async def client(left: list[str]) -> int:
            count = 0
            while left:
                (_, _, usage) = await streamed(http, body(left.pop(), arguments.tokens, stream=True))
                count += usage
            return count

        for turn in range(1 + arguments.turns):
            asked = questions[turn * ROWS : (turn + 1) * ROWS]  # never the same: the server still has what it read
            for side in ("engine", "server"):
                started, cpu_before = time.perf_counter(), cpu_seconds(processes[side])
                if side == "engine":
                    count = sum(answer.tokens_sampled for answer in engine.generate(asked, options=options))
                else:
                    left = list(asked)
                    count = sum(await asyncio.gather(*(client(left) for _ in range(ROWS))))
                if turn:  # the first warms both up
                    spent[side] += time.perf_counter() - started
                    cpu[side] += cpu_seconds(processes[side]) - cpu_before
                    written[side] += count
    speed = {side: written[side] / spent[side] for side in spent}
    return {
        "serve_overhead": 1 - speed["server"] / speed["engine"],
        "serve_overhead_cpu": cpu["server"] / written["server"] / (cpu["engine"] / written["engine"]) - 1,
        "tokens_per_second": speed["server"],
        "engine_tokens_per_second": speed["engine"],
    }


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def streamed(http: httpx.AsyncClient, asked: dict[str, Any], *, stop: bool = False) -> tuple[int, Seen, int]:
    """Status, what was answered, and tokens; goes away after the first event if `stop`."""
    text, notes, usage = "", [], 0
    async with http.stream("POST", "/v1/chat/completions", json=asked) as answer:
        if answer.status_code != 200:
            return answer.status_code, ("", ()), int(answer.headers.get("retry-after", 0))
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return 500, ("", ()), 0
            if stop:
                break
            usage = (chunk.get("usage") or {}).get("completion_tokens", usage)
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                notes += choice["delta"].get("annotations") or []
    return 200, (text, cited(notes)), usage


def cited(notes: Sequence[dict[str, Any]]) -> tuple[tuple[str, int, int], ...]:
    each = [note["url_citation"] for note in notes]
    return tuple((note["passage_id"], note["start_index"], note["end_index"]) for note in each)


async def load(
    arguments: argparse.Namespace, engine: Engine, model: Path, index: Path, questions: Sequence[str]
) -> dict[str, float]:
    told: Counter[str] = Counter()
    seen: dict[str, Counter[Seen]] = {question: Counter() for question in questions}
    sizes: list[float] = []
    async with server(model, index, arguments.queue, arguments.dtype) as (http, process):
        end = time.perf_counter() + arguments.seconds

        async def client(number: int) -> None:
            turn = number
            while time.perf_counter() < end:
                turn += 1
                await request(http, arguments.tokens, questions[turn * 7 % len(questions)], turn, told, seen)

        async def watch() -> None:
            while time.perf_counter() < end:
                sizes.append(process.memory_info().rss)
                await asyncio.sleep(0.25)

        await asyncio.gather(watch(), *(client(i) for i in range(arguments.clients)))
        await asyncio.sleep(1)
        gauges = (await http.get("/metrics")).text
    left = sum(float(gauges.split(f"\n{name} ")[1].split()[0]) for name in ("cosup_rows_in_use", "cosup_queue_waiting"))
    expected = alone(engine, questions, arguments.tokens)
    different = sum(n for question, answers in seen.items() for got, n in answers.items() if got != expected[question])
    quarter = len(sizes) // 4
    return {
        "requests": float(told.total()),
        "answered": float(told["answered"]),
        "broken_off": float(told["broken off"]),
        "refused": float(told["refused"]),
        "failed": float(told["failed"]),
        "different": float(different),
        "rows_left": left,
        "memory_growth": max(sizes[-quarter:]) / max(sizes[quarter : 2 * quarter]) - 1,
        "memory_mb": max(sizes) / 1e6,
    }


async def request(
    http: httpx.AsyncClient,
    tokens: int,
    question: str,
    turn: int,
    told: Counter[str],
    seen: dict[str, Counter[Seen]],
) -> None:
    """One request of one client; a refused one waits as it is told."""
    stop, stream = turn % 10 == 0, turn % 2 == 0
    try:
        if stream:
            status, got, wait = await streamed(http, body(question, tokens, stream=True), stop=stop)
        else:
            answer = await http.post("/v1/chat/completions", json=body(question, tokens, stream=False))
            status, wait = answer.status_code, int(answer.headers.get("retry-after", 0))
            message = answer.json()["choices"][0]["message"] if status == 200 else {"content": "", "annotations": []}
            got = message["content"], cited(message["annotations"])
    except (httpx.HTTPError, ValueError, KeyError):
        told["failed"] += 1
        return
    if status == 200:
        told["broken off" if stop else "answered"] += 1
        if not stop:
            seen[question][got] += 1
    elif status == 429 and wait >= 1:
        told["refused"] += 1
        await asyncio.sleep(wait)
    else:
        told["failed"] += 1


def alone(engine: Engine, questions: Sequence[str], tokens: int) -> dict[str, Seen]:
    """What the engine answers to each question when it answers nothing else."""
    options = Options(max_new_tokens=tokens, retrieve_first=True)
    answers = {question: engine.generate([question], options=options)[0] for question in questions}
    return {
        question: (answer.text, tuple((claim.passage, claim.start, claim.end) for claim in answer.claims))
        for question, answer in answers.items()
    }


def report(arguments: argparse.Namespace, engine: Engine, figures: dict[str, float]) -> None:
    has = torch.cpu.get_capabilities()
    line = {
        "benchmark": "serve",
        "figures": {name: round(value, 4) for name, value in figures.items()},
        "config": {
            "model": "trained" if arguments.model else "random" if arguments.quick else "smollm2-135m",
            "clients": arguments.clients or ROWS,
            "seconds": arguments.seconds if arguments.clients else None,
            "turns": None if arguments.clients else arguments.turns,
            "tokens": arguments.tokens,
            "rows": ROWS,
            "queue": arguments.queue if arguments.clients else 64,
            "quick": arguments.quick,
            "dtype": str(next(engine.model.parameters()).dtype).removeprefix("torch."),
        },
        "hardware": {"cpu": has.get("cpu_name"), "threads": torch.get_num_threads()},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
