"""Processes that write checkpoints while training goes on."""

import sys
import time
import warnings
from ast import literal_eval
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3_lightning.parallel.checkpoints.buffer import Buffer, memory_file
from dsv3_lightning.parallel.checkpoints.plan import plan_of
from tests.parallel.conftest import start_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits another process's files")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def found(folder):
    """What two ranks print, each as a dict."""
    ranks = start_ranks(2, folder / "logs", ["tests.parallel.saving_worker", str(folder)])
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    outputs = [(folder / f"logs/rank{rank}.log").read_text() for rank in range(2)]
    assert codes == [0, -9], "\n".join(outputs)
    return [dict(line.split(": ", 1) for line in output.splitlines() if ": " in line) for output in outputs]


def test_a_checkpoint_is_of_the_moment_of_saving_and_whole_after_every_signal_that_ends_a_run(found):
    for rank in found:
        step, first = literal_eval(rank["first"])
        assert step == 1 and first == {"weight": [0, 1, 2, 3, 4, 5], "copied": [[1, 1], [1, 1]],
                                       "of0": [0, 0], "of1": [1, 1]}  # fmt: skip
        step, second = literal_eval(rank["second"])
        assert step == 2 and second == first | {"weight": [10, 11, 12, 13, 14, 15]}


def test_what_is_written_where_is_planned_once_for_as_long_as_it_stays_the_same(found):
    for rank in found:
        assert (rank["planned"], rank["planned again"]) == ("1", "2")
        assert literal_eval(rank["third"])[1] == {"weight": [20, 21, 22, 23, 24, 25], "of0": [0, 0], "of1": [1, 1]}


def test_what_one_rank_cannot_write_ends_all_with_a_line(found, folder):
    for what, number, reason in (
        ("full", 4, "File too large"),
        ("killed", 5, "the process that writes it was killed by SIGKILL"),
    ):
        path = folder / f"step={number}.ckpt"
        assert found[1][what] == f"WriteError {path}: can't be written ({reason})"
        assert found[0][what] == f"RunStopped rank 0 stops: rank 1 could not write {path} ({reason})"
    assert "step=4.ckpt.new" not in found[0]["there"] and "step=4.ckpt" not in found[0]["there"]


def test_with_a_rank_its_writer_ends_too_and_the_others_are_told(found):
    assert found[0]["gone"] == "DistNetworkError rank 1 is gone" and "step=6.ckpt'" not in found[0]["there"]
    assert [rank["zombies"] for rank in found] == ["False", "False"]
    end = time.monotonic() + 20
    writers = [int(rank["writer"]) for rank in found]
    while any(map(is_running, writers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_running, writers))


def is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # whoever adopts it may not wait for it
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("code", [0, 712])
def test_memory_that_gpus_copy_to_is_pinned_for_as_long_as_it_is_mapped(monkeypatch, code):
    """Where CUDA can't pin it, that is said, and it is used as it is."""
    calls = []
    cuda = SimpleNamespace(
        cudaHostRegister=lambda at, length, flags: (calls.append(("pin", at, length)), code)[1],
        cudaHostUnregister=lambda at: calls.append(("unpin", at)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    buffer = Buffer(memory_file(), pin=True)
    for length in (100, 200):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            buffer.map(length)
        assert ["not pinned (CUDA error 712)" in str(warning.message) for warning in said] == [True] * (code > 0)
        buffer.memory[length - 1] = 7
        other = Buffer(buffer.file)
        other.map(length)
        assert other.memory[length - 1] == 7
    buffer.close()
    (_, first, _), *_ = calls
    second = calls[-1][1]
    pinned = [("pin", first, 100), ("unpin", first), ("pin", second, 200), ("unpin", second)]
    assert calls == (pinned if code == 0 else pinned[::2])


def test_every_number_is_written_by_one_rank_without_asking_another():
    """Eight ranks, two with each shard of a weight, four with each of a norm, all with a buffer; 40 of each."""
    written = {"weight": np.zeros((6, 4), int), "norm": np.zeros(5, int), "buffer": np.zeros(3, int)}
    writers = set()
    for rank in range(8):
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        try:
            plan = plan_of(tensors_of_rank(40), rank, list(range(8)))
        finally:
            dist.destroy_process_group()
        ends = [0, *(piece.at + piece.bytes for piece in plan.pieces)]
        assert all(piece.at % 64 == 0 and piece.at >= end for piece, end in zip(plan.pieces, ends, strict=False))
        assert plan.length >= ends[-1]
        for piece in plan.pieces:
            kind = piece.name.split(".")[0]
            written[kind][tuple(slice(at, at + n) for at, n in zip(piece.offsets, piece.sizes, strict=True))] += 1
            writers |= {(kind, rank)}
    assert all((counts == 40).all() for counts in written.values())
    assert all({rank for name, rank in writers if name == kind} == set(range(8)) for kind in written)


def tensors_of_rank(number: int) -> dict[str, torch.Tensor]:
    """Without numbers."""
    mesh = init_device_mesh("cpu", (2, 2, 2))
    layouts = (
        ("weight", (6, 4), (Replicate(), Shard(0), Shard(1))),
        ("norm", (5,), (Replicate(), Replicate(), Shard(0))),
    )
    tensors: dict[str, torch.Tensor] = {f"buffer.{i}": torch.zeros(3) for i in range(number)}
    for name, shape, how in layouts:
        meta = TensorMeta(torch.Size(shape), torch.empty(shape).stride(), torch.float32)
        empty = torch.empty([0] * len(shape))
        spread = DTensor(empty, DTensorSpec(mesh, how, tensor_meta=meta), requires_grad=False)
        tensors |= {f"{name}.{i}": spread for i in range(number)}
    return tensors
