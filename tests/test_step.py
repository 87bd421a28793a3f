"""Two gloo processes give the loss and every gradient of one process on the joined batch."""

import faulthandler
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import load_fsdp_optimizer, save_fsdp_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosup import train
from cosup.config import Objective, TrainSection, UserError
from cosup.data import Evidence, Example, Passage, Text
from cosup.model import Batch, CoSupModel, chunk_count, chunks
from cosup.model.core import Output
from cosup.train import backward_in_chunks, objective_loss, trainer
from cosup.train.checkpoints import SHARDS, is_sharded, load_trained, save_trained, whole_weights
from cosup.train.optimizer import adamw
from cosup.train.parts import save_activations

DEADLINE = 600
"""Seconds that two processes have, of which a quiet machine needs 10 to 20: a busy one is not taken for a hang."""

pytestmark = pytest.mark.timeout(DEADLINE + 120)  # the deadline above is told with what the processes were doing

PASSAGES = [Passage(f"p{i}", f"{text} ({i})", "Title") for i, text in enumerate(["Oslo", "krone", "iron, gold"] * 4)]


def cites(id: str, *passages: str, negatives: tuple[str, ...] = (), also: tuple[str, ...] = ()) -> Example:
    parts = tuple(Evidence(passage, f"claim {passage}", also=also, negatives=negatives) for passage in passages)
    return Example(id, "squad", f"what of {id}?", parts)


def says(id: str) -> Example:
    return Example(id, "squad", "Hello?", (Text("Hello, world! " + id),))


CASES: dict[str, tuple[list[Example], list[Example]]] = {
    "even": ([cites("a", "p0"), says("b")], [cites("c", "p1"), cites("d", "p2")]),
    "uneven": ([cites("a", "p0", "p3", "p4"), cites("b", "p1"), cites("x", "p5")], [cites("c", "p2")]),
    "zero on one rank": ([cites("a", "p0"), cites("b", "p1", negatives=("p2",))], [says("c"), says("d")]),
    "zero on all ranks": ([says("a")], [says("b"), says("c")]),
    "the same gold": ([cites("a", "p0"), cites("b", "p1")], [cites("c", "p0", also=("p1",))]),
    "the same negative": (
        [cites("a", "p0", negatives=("p5", "p6"))],
        [cites("b", "p1", negatives=("p6",)), cites("c", "p2", negatives=("p6", "p7"), also=("p5",))],
    ),
    "two micro-batches against one": ([cites("a", "p0"), cites("b", "p1")], [cites("c", "p2")]),
}
OBJECTIVES: tuple[Objective, ...] = ("ntp+nsp", "nsp", "separate")
WAYS = ("ddp", "ddp in chunks", "fsdp", "fsdp in chunks")


def settings(objective: Objective) -> dict[str, Any]:
    return {"objective": objective, "lambda_": 1.0, "temperature": 0.05}


def collate(model: CoSupModel, examples: list[Example], objective: Objective) -> Batch:
    section = TrainSection(objective=objective, negatives=4)
    return train.collate(model.template, examples, {p.id: p for p in PASSAGES}, section)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of every parameter, whole; zeros where there is none."""
    whole = {}
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        whole[name.removeprefix("module.")] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach()
    return whole


def step(model: Any, batch: Batch, objective: Objective, *, chunk: int | None) -> Tensor:
    model.zero_grad()
    if chunk is not None:
        return backward_in_chunks(model, batch, size=chunk, **settings(objective))[0]
    loss, _ = objective_loss(model(batch), batch, **settings(objective))
    loss.backward()
    return loss.detach()


def two_processes(work: Callable[..., None], folder: Path, *args: Any) -> None:
    """Runs `work(rank, folder, *args)` in two gloo processes; fails if they do not end in time, and says where."""
    context = mp.start_processes(_process, (work, folder, args), nprocs=2, join=False, start_method="spawn")
    deadline = time.monotonic() + DEADLINE
    while not context.join(timeout=max(0.0, deadline - time.monotonic())):  # returns whenever one of them ends
        if time.monotonic() >= deadline:
            for process in context.processes:
                process.kill()
            where = "\n".join(file.read_text() for file in sorted(folder.glob("rank*.txt")))
            pytest.fail(f"two processes did not end within {DEADLINE} seconds; they were at\n{where}")


def _process(rank: int, work: Callable[..., None], folder: Path, args: tuple[Any, ...]) -> None:
    with (folder / f"rank{rank}.txt").open("w") as where:
        faulthandler.dump_traceback_later(DEADLINE * 0.95, file=where)
        torch.set_num_threads(1)
        # by itself, gloo asks for the address of the host's name, which some machines answer late or not at all
        os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        work(rank, folder, *args)
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def every_case(rank: int, folder: Path, model_folder: Path) -> None:
    for way in WAYS:
        for objective in OBJECTIVES:
            model = wrap(CoSupModel.load(model_folder, dtype="float64", device="cpu"), way, objective)
            inner = model.module if hasattr(model, "module") else model
            for case, halves in CASES.items():
                batch = collate(inner, halves[rank], objective)
                loss = step(model, batch, objective, chunk=1 if "chunks" in way else None)
                dist.all_reduce(loss)
                moved = [p for p in model.parameters() if p.grad is not None]
                result = {"loss": loss / 2, "norm": trainer._norm(moved)} | gradients(model)
                if rank == 0:
                    save_file({k: v.contiguous() for k, v in result.items()}, folder / f"{way}.{objective}.{case}")
            if is_sharded(model):
                whole = whole_weights(model)
                (folder / "sharded").mkdir(exist_ok=True)
                save_trained(model, folder / "sharded")
                if rank == 0:
                    save_file({k: v.clone() for k, v in whole.items()}, folder / "whole")


def wrap(model: CoSupModel, way: str, objective: Objective) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model.train()
    if way.startswith("ddp"):
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model.gen.model.layers, *model.emb.layers):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.fixture(scope="module")
def distributed(_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    two_processes(every_case, folder, _tiny_model)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_loss_and_every_gradient_of_one(
    distributed: Path, tiny: CoSupModel, way: str, objective: Objective, case: str
) -> None:
    first, second = CASES[case]
    tiny.train()
    loss = step(tiny, collate(tiny, first + second, objective), objective, chunk=None)
    expected, actual = gradients(tiny), load_file(distributed / f"{way}.{objective}.{case}")
    assert actual.pop("loss").item() == pytest.approx(loss.item(), rel=1e-9)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert actual.pop("norm").item() == pytest.approx(norm, rel=1e-9)
    assert set(actual) == set(expected)
    moved = 0
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
        moved += bool(gradient.norm() > 1e-9)
    assert moved > 10 or (objective == "nsp" and case == "zero on all ranks")  # or the test would say nothing


def test_sharded_weights_are_gathered_whole(distributed: Path, tiny: CoSupModel) -> None:
    whole, expected = load_file(distributed / "whole"), tiny.state_dict()
    assert set(whole) == set(expected)
    assert all(torch.equal(weight, whole[name]) for name, weight in expected.items())


def test_a_sharded_checkpoint_is_spread_over_files_and_put_back_whole(distributed: Path, tiny: CoSupModel) -> None:
    expected = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    files = sorted((distributed / "sharded" / SHARDS).iterdir())
    assert len(files) == 2
    assert all(file.stat().st_size < sum(p.nbytes for p in expected.values()) * 0.6 for file in files)
    with torch.no_grad():
        for p in tiny.parameters():
            p.zero_()
    load_trained(tiny, distributed / "sharded")
    assert all(torch.equal(p, expected[name]) for name, p in tiny.named_parameters())
    tiny.emb.requires_grad_(False)
    with pytest.raises(UserError, match="weights of another model"):
        load_trained(tiny, distributed / "sharded")


def sharded_masters(rank: int, folder: Path, model_folder: Path) -> None:
    """Optimisers made before the weights are sharded, as transformers and accelerate do it; the second goes on."""
    PartialState(cpu=True)  # accelerate's functions log by it
    for name, first, last in (("whole", 0, 4), ("resumed", 2, 4)):
        model, optimizer = wrapped_after_its_optimizer(model_folder)
        if first:
            load_trained(model, folder / "checkpoint")
            load_fsdp_optimizer(FSDP, ACCELERATOR, optimizer, model, folder / "checkpoint")
        for number in range(first, last):
            give_gradients(model, number)
            optimizer.step()
            if (name, number) == ("whole", 1):
                (folder / "checkpoint").mkdir(exist_ok=True)
                save_trained(model, folder / "checkpoint")
                save_fsdp_optimizer(FSDP, ACCELERATOR, optimizer, model, folder / "checkpoint")
        weights = {key: weight.clone() for key, weight in whole_weights(model).items()}
        if rank == 0:
            save_file(weights, folder / name)


# what accelerate's functions ask of a run that it launched under FSDP2; itself it refuses to on a CPU
FSDP: Any = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
ACCELERATOR: Any = SimpleNamespace(
    process_index=0, num_processes=2, is_fsdp2=True, wait_for_everyone=lambda: dist.barrier()
)


def wrapped_after_its_optimizer(model_folder: Path) -> tuple[Any, torch.optim.Optimizer]:
    model = CoSupModel.load(model_folder, dtype="bfloat16", device="cpu")
    optimizer = adamw(list(model.parameters()), TrainSection(weight_decay=0.1, learning_rate=0.01))
    names = {id(p): name for name, p in model.named_parameters()}
    held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    sharded = wrap(model, "fsdp", "ntp+nsp")
    now = dict(sharded.named_parameters())
    for group, members in zip(optimizer.param_groups, held, strict=True):
        group["params"] = [now[name] for name in members]
    return sharded, optimizer


def give_gradients(model: torch.nn.Module, number: int) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p) * (number + 1)


def test_masters_of_sharded_bfloat16_weights_step_and_resume_like_whole_ones(tiny_folder: Path, tmp_path: Path) -> None:
    two_processes(sharded_masters, tmp_path, tiny_folder)
    model = CoSupModel.load(tiny_folder, dtype="bfloat16", device="cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = adamw(list(model.parameters()), TrainSection(weight_decay=0.1, learning_rate=0.01))
    for number in range(4):
        give_gradients(model, number)
        optimizer.step()
    whole, resumed = load_file(tmp_path / "whole"), load_file(tmp_path / "resumed")
    for name, weight in model.state_dict().items():
        assert not torch.equal(weight, before[name])
        assert torch.equal(weight, whole[name]), name
        assert torch.equal(weight, resumed[name]), name


@pytest.mark.parametrize("chunk", [None, 2])
def test_activation_checkpointing_changes_neither_loss_nor_gradient(tiny: CoSupModel, chunk: int | None) -> None:
    batch = collate(tiny.train(), CASES["uneven"][0], "ntp+nsp")
    loss = step(tiny, batch, "ntp+nsp", chunk=None)
    expected = gradients(tiny)
    save_activations(tiny)
    assert step(tiny, batch, "ntp+nsp", chunk=chunk).item() == pytest.approx(loss.item(), rel=1e-12)
    for name, gradient in gradients(tiny).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


@pytest.fixture
def droppy(_tiny_model: Path) -> CoSupModel:
    return with_dropout(_tiny_model)


def with_dropout(folder: Path) -> CoSupModel:
    """The model in float64, training, with dropout in its attention."""
    model = CoSupModel.load(folder, dtype="float64", device="cpu").train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model


@pytest.mark.parametrize("objective", ["ntp+nsp", "nsp", "ntp"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_cached_gradients_equal_the_plain_ones_with_dropout_on(
    droppy: CoSupModel, objective: Objective, size: int
) -> None:
    examples = CASES["uneven"][0] + CASES["the same negative"][1]
    batch = collate(droppy, examples, objective)
    torch.manual_seed(5)
    loss = plain_over_chunks(droppy, batch, objective, size)
    expected = gradients(droppy)
    torch.manual_seed(5)
    cached = step(droppy, batch, objective, chunk=size)
    assert cached.item() == pytest.approx(loss.item(), rel=1e-12)
    for name, gradient in gradients(droppy).items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
    torch.manual_seed(6)
    other = step(droppy, batch, objective, chunk=size)
    assert abs(other.item() - loss.item()) > 1e-6  # dropout was on


def plain_over_chunks(
    model: CoSupModel, batch: Batch, objective: Objective, size: int, *, count: int | None = None
) -> Tensor:
    """Loss and gradient with the activations of all chunks in memory."""
    model.zero_grad()
    outputs = [model(part) for part in chunks(batch, size, count=count or chunk_count(batch, size))]
    sizes = [len(batch.get("emb_lengths", ())[i * size : (i + 1) * size]) for i in range(len(outputs))]
    joined = Output(
        torch.stack([output.ntp_sum for output in outputs]).sum(),
        sum(output.ntp_count for output in outputs),
        torch.cat([output.queries_KD for output in outputs]),
        torch.cat([output.candidates_ND[:n] for output, n in zip(outputs, sizes, strict=True)]),
    )
    loss, _ = objective_loss(joined, batch, **settings(objective))
    loss.backward()
    return loss.detach()


WITH_DROPOUT = ("uneven", "zero on one rank", "the same negative", "two micro-batches against one")


def cached_with_dropout(rank: int, folder: Path, model_folder: Path) -> None:
    """Plain gradients of the two processes, averaged by hand, and cached ones by DDP and FSDP2."""
    for objective in OBJECTIVES:
        models = {way: wrap(with_dropout(model_folder), way, objective) for way in ("ddp", "fsdp")}
        for case in WITH_DROPOUT:
            plain = with_dropout(model_folder)
            halves = [collate(plain, half, objective) for half in CASES[case]]
            results: dict[str, dict[str, Tensor]] = {}
            torch.manual_seed(5 + rank)
            count = max(chunk_count(half, 1) for half in halves)
            loss = plain_over_chunks(plain, halves[rank], objective, 1, count=count)
            results["plain"] = {"loss": loss} | gradients(plain)
            for gradient in results["plain"].values():
                dist.all_reduce(gradient)
                gradient /= 2
            for way, model in models.items():
                for seed in (5, 6):
                    torch.manual_seed(seed + rank)
                    loss = step(model, halves[rank], objective, chunk=1)
                    dist.all_reduce(loss)
                    results[way if seed == 5 else f"{way}, other numbers"] = {"loss": loss / 2} | gradients(model)
            if rank == 0:
                for name, result in results.items():
                    whole = {key: value.contiguous() for key, value in result.items()}
                    save_file(whole, folder / f"{objective}.{case}.{name}")


@pytest.fixture(scope="module")
def dropped(_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dropped")
    two_processes(cached_with_dropout, folder, _tiny_model)
    return folder


@pytest.mark.parametrize("case", WITH_DROPOUT)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_give_the_same_cached_gradients_as_plain_ones_with_dropout_on(
    dropped: Path, way: str, objective: Objective, case: str
) -> None:
    plain, cached, other = (
        load_file(dropped / f"{objective}.{case}.{name}") for name in ("plain", way, f"{way}, other numbers")
    )
    assert set(cached) == set(plain)
    assert cached.pop("loss").item() == pytest.approx(plain["loss"].item(), rel=1e-9)
    for name, gradient in cached.items():
        error = (gradient - plain[name]).norm() / plain[name].norm().clamp(min=1e-12)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
    assert any(gradient.norm() > 1e-9 for gradient in cached.values())
    assert abs(other["loss"].item() - plain["loss"].item()) > 1e-6  # dropout was on


def test_chunks_hold_every_label_query_and_passage_once(tiny: CoSupModel) -> None:
    batch = collate(tiny, CASES["uneven"][0], "ntp+nsp")
    parts = chunks(batch, 2, count=5)
    labels = torch.cat([part["labels"] for part in parts])
    assert torch.equal(labels, batch["labels"])
    asked = torch.cat([part["gen_ids"][part["ret_positions"]] for part in parts])
    assert len(asked) == len(batch["ret_positions"])
    assert set(asked.tolist()) == {tiny.template.ret}
    read = [part["gen_ids"][part["label_positions"] + 1] for part in parts]
    assert torch.equal(torch.cat(read), batch["labels"])
    assert len(parts[-1]["gen_ids"]) == 1
    assert not len(parts[-1]["labels"])
