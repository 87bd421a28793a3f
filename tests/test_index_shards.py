"""Builds that are killed, and builds by several workers: the same bytes, whoever made them and however often."""

import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cosup.config import UserError
from cosup.data import Passage
from cosup.index import FaissIndex, build_index
from cosup.index import shards as sharding
from cosup.index.shards import ShardStore, embed_shard, is_done, plan_shards

DIM = 16
COUNT = 6000


class SlowEmbedder:
    """Vectors that depend on the text alone; the first worker to embed a marked shard kills itself."""

    fingerprint = "slow"
    dim = DIM

    def __init__(self, seconds: float = 0.0, suicide: Path | None = None):
        self.seconds, self.suicide = seconds, suicide

    def embed_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        time.sleep(self.seconds)
        if self.suicide is not None and not self.suicide.exists() and passages[0].id != "p0":
            self.suicide.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rows = [np.random.default_rng(zlib.crc32(p.text.encode())).standard_normal(DIM) for p in passages]
        return np.stack(rows).astype(np.float32)


class Factory:
    def __init__(self, suicide: Path | None = None):
        self.suicide = suicide

    def __call__(self, worker: int) -> SlowEmbedder:
        return SlowEmbedder(suicide=self.suicide)


def corpus(count: int = COUNT) -> list[Passage]:
    return [Passage(f"p{i}", f"text {i}", f"title {i % 7}", {"n": i % 5}) for i in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    """What must be equal: all but when it happened."""
    paths = {path for path in folder.rglob("*") if path.is_file()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name not in ("history.jsonl", "lock")}


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_index_shards import SlowEmbedder, corpus
from cosup.index import build_index
build_index(corpus(), SlowEmbedder(0.1), Path(sys.argv[1]), kind="IVF32,PQ4", dtype="float16",
            on_progress=lambda done: print(done, flush=True))
"""


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_build_killed_at_a_random_moment_and_run_again_is_the_same_byte_for_byte(tmp_path: Path, seed: int) -> None:
    whole = build_index(corpus(), SlowEmbedder(), tmp_path / "whole", kind="IVF32,PQ4", dtype="float16")
    build_index(corpus(100), SlowEmbedder(), tmp_path / "index")  # an index that is there stays readable
    before = FaissIndex(tmp_path / "index").manifest
    process = start(tmp_path / "index")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(random.Random(seed).random() * 1.2)
    process.kill()
    process.communicate()
    opened = FaissIndex(tmp_path / "index")
    killed_in_time = opened.manifest == before
    assert killed_in_time or len(opened) == COUNT
    process = start(tmp_path / "index")
    process.communicate()
    assert process.returncode == 0
    assert len(FaissIndex(tmp_path / "index")) == COUNT
    fresh = tmp_path / "fresh"
    process = start(fresh)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(random.Random(seed).random() * 0.8)
    process.kill()
    process.communicate()
    assert not (fresh / "index.json").exists() or (fresh / "building").exists() or len(FaissIndex(fresh)) == COUNT
    process = start(fresh)
    process.communicate()
    assert contents(fresh) == contents(whole.folder)


@pytest.mark.slow
def test_several_processes_build_the_same_index(tmp_path: Path) -> None:
    whole = build_index(corpus(), SlowEmbedder(), tmp_path / "whole")
    told: list[int] = []
    build_index(corpus(), SlowEmbedder(), tmp_path / "index", workers=2, factory=Factory(), on_progress=told.append)
    assert contents(tmp_path / "index") == contents(whole.folder)
    assert told[-1] == COUNT


@pytest.mark.slow
def test_a_process_that_dies_is_one_clear_error_and_the_build_goes_on(tmp_path: Path) -> None:
    whole = build_index(corpus(), SlowEmbedder(), tmp_path / "whole")
    factory = Factory(tmp_path / "died")
    with pytest.raises(UserError, match=r"a process that embeds passages died.*it goes on"):
        build_index(corpus(), SlowEmbedder(), tmp_path / "index", workers=2, factory=factory)
    build_index(corpus(), SlowEmbedder(), tmp_path / "index", workers=2, factory=factory)
    assert contents(tmp_path / "index") == contents(whole.folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_ray_builds_the_same_index_though_one_of_its_workers_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    whole = build_index(corpus(), SlowEmbedder(), tmp_path / "whole")
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    told: list[int] = []
    try:
        build_index(
            corpus(),
            SlowEmbedder(),
            tmp_path / "index",
            engine="ray",
            workers=2,
            factory=Factory(tmp_path / "died"),
            on_progress=told.append,
        )
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists()
    assert contents(tmp_path / "index") == contents(whole.folder)
    assert told[-1] == COUNT


def test_shards_in_a_store_named_by_a_uri_are_the_same(tmp_path: Path) -> None:
    whole = build_index(corpus(50), SlowEmbedder(), tmp_path / "whole")
    uri = (tmp_path / "store").as_uri()
    build_index(corpus(50), SlowEmbedder(), tmp_path / "index", shards=uri)
    assert contents(tmp_path / "index") == contents(whole.folder)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("place", ["nope://x", "s3://"])
def test_a_place_where_no_shards_can_be_is_told(tmp_path: Path, place: str) -> None:
    with pytest.raises(UserError, match=f"no shards can be kept at {place} "):
        build_index(corpus(5), SlowEmbedder(), tmp_path / "index", shards=place)


def test_a_shard_whose_vectors_are_damaged_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "SHARD", 10)
    store = ShardStore(str(tmp_path / "store"))
    assert list(plan_shards(store, corpus(20), fingerprint="slow", dtype="int8")) == [10, 10]
    for number in (0, 1):
        embed_shard(store, number, SlowEmbedder(), dtype="int8")
    assert is_done(store, 0)
    data = bytearray((tmp_path / "store" / "vectors-000000.parquet").read_bytes())
    data[50] ^= 1
    (tmp_path / "store" / "vectors-000000.parquet").write_bytes(data)
    assert not is_done(store, 0)
    assert is_done(store, 1)


def test_several_workers_without_a_factory_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="factory"):
        build_index(corpus(5), SlowEmbedder(), tmp_path / "index", workers=2)


def test_shards_leave_files_of_others_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "theirs.txt").write_text("kept")
    store = ShardStore(str(tmp_path))
    store.write("done-000000.json", b"{}")
    store.delete()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.txt"]
