"""Every command and every Python block of the README, run in order on the tiny model."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from cosup.config import RELEASED
from cosup.data import Passage, Question, write_records

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SHORTER = {"train": "--set train.max_steps=2", "demo": "--minutes 0.02"}
"""What is added to a command so that it ends soon; nothing is taken away."""
NOT_HERE = ("make ", "git ", "cd ", "pip ", "python benchmarks/")
"""They install, or run the whole test suite or a benchmark; `.ci/run` and the benchmark's own test run them."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def commands() -> list[str]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path) -> Path:
    """A working folder as the README assumes it, in which `smollm2-135m` is the tiny model."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_lm, place / "cache" / "cosup" / "smollm2-135m")
    shutil.copytree(ROOT / "recipes", place / "recipes")
    (place / "notes").mkdir()
    (place / "notes" / "norway.md").write_text("# Norway\n\nOslo is the capital of Norway.\n")
    data = place / "data"
    corpus = [Passage("p0", "Oslo is the capital.", "Norway"), Passage("p1", "Gold has the number 79.", "Gold")]
    write_records(data / "corpus.jsonl.gz", corpus)
    for name in ("train/squad", "train/newwiki", "dev/squad", "dev/nq"):
        write_records(data / f"{name}.jsonl.gz", [Question("q", "squad", "Which city?", answers=["Oslo"], gold=["p0"])])
    return place


def answers_healthz(command: str, place: Path, environment: dict[str, str]) -> bool:
    """Whether a server that a command starts says that it is well; it is stopped afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(shlex.split(f"{command} --port {port}"), cwd=place, env=environment)
    try:
        for _ in range(300):
            assert process.poll() is None, f"{command} ended by itself"
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
                return bool(answer.status == 200)
            time.sleep(0.2)
        return False
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
def test_readme_commands_run(place: Path, tiny_adapters: Path) -> None:
    environment = os.environ | {
        "COSUP_MODEL": str(tiny_adapters),
        "XDG_CACHE_HOME": str(place / "cache"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    ran = []
    for command in commands():
        if command.startswith(NOT_HERE):
            continue
        if command.startswith("cosup serve"):
            assert answers_healthz(command, place, environment)
            continue
        shorter = SHORTER.get(command.split()[1], "")
        done = subprocess.run(
            shlex.split(f"{command} {shorter}"),
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran.append(command.split()[1])
    assert {"demo", "train", "index", "ask", "generate", "evaluate", "ingest", "data"} <= set(ran)


@pytest.mark.slow
def test_readme_python_runs(
    place: Path, tiny_adapters: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    assert Path("my-index").is_dir(), "the commands come first: they make the index that is opened here"
    found = blocks("python")
    assert len(found) == 2
    for block in found:
        assert len(block.strip().splitlines()) <= 12
        block = block.replace('"runs/again"', '"runs/python"').replace(RELEASED, str(tiny_adapters))
        exec(compile(block, "README", "exec"), {})
    assert capsys.readouterr().out
