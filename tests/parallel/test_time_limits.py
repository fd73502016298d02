"""What torch, NCCL and gloo are told by a run, and how long a collective waits for a rank."""

import os
import subprocess
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.environment import added, run_environment, several_processes
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.lost import peer_failure
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.parallel.strategy import MeshStrategy


def test_the_recorder_writes_into_the_runs_folder_and_memory_grows_in_segments():
    names = run_environment("cuda", True, Path("/runs/v3/flight_recorder"), {})
    assert names == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "NCCL_DEBUG": "WARN",
        "TORCH_FR_BUFFER_SIZE": "20000",
        "TORCH_FR_DUMP_TEMP_FILE": "/runs/v3/flight_recorder/rank_",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_GLOO_LAZY_INIT": "1",
    }
    assert run_environment("cpu", True, Path("x"), {}) == {}
    assert run_environment("cpu", False, Path("x"), {}) == {}
    assert run_environment("cuda", False, Path("x"), {}) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(name):
    names = run_environment("cuda", True, Path("x"), {name: "max_split_size_mb:128", "NCCL_DEBUG": "INFO"})
    assert "PYTORCH_ALLOC_CONF" not in names and "NCCL_DEBUG" not in names
    with added(os.environ, {"A_VARIABLE_OF_A_RUN": "1"}):
        assert os.environ["A_VARIABLE_OF_A_RUN"] == "1"
    assert "A_VARIABLE_OF_A_RUN" not in os.environ


def test_one_device_on_one_node_is_one_process():
    assert not several_processes({"devices": 1, "num_nodes": 1})
    assert all(several_processes(t) for t in ({"devices": "auto", "num_nodes": 1}, {"devices": 1, "num_nodes": 2}))


@pytest.mark.parametrize("minutes", [0, -1.0, 31.0])
def test_a_limit_that_makes_no_sense_is_refused(minutes):
    message = "^strategy.step_timeout_minutes=.*: must be above 0 and at most strategy.timeout_minutes=30.0, or null$"
    with pytest.raises(ConfigError, match=message):
        StrategyConfig(kind="fsdp2", step_timeout_minutes=minutes)


def test_from_the_second_step_on_every_group_waits_less():
    def timeouts():
        groups = [dist.group.WORLD, *strategy.meshes.dense.get_all_groups()]
        return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}

    strategy = MeshStrategy(kind="fsdp2", step_timeout_minutes=2.0)
    trainer = SimpleNamespace(global_step=40)  # it was resumed
    strategy._lightning_module = SimpleNamespace(trainer=trainer)
    first = timedelta(minutes=30)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=first)
    try:
        strategy.meshes = build_meshes(MeshShape(1, 1), "cpu", first)
        for batch_idx in range(3):  # micro-batches of the first step
            strategy.on_train_batch_start({}, batch_idx)
        assert timeouts() == {first}
        trainer.global_step = 41
        strategy.on_train_batch_start({}, 3)
        assert timeouts() == {timedelta(minutes=2)}
    finally:
        dist.destroy_process_group()


WATCHDOG = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=600000) ran for 600014 milliseconds before timing out."
)
NCCL_ERROR = "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:328, {}, NCCL version 2.27.5\n{}"
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (WATCHDOG, "another rank did not answer within"),
        (NCCL_ERROR.format("remote process exited or there was a network error", REMOTE), "another rank is gone"),
        ("NCCL communicator was aborted on rank 0.", "another rank is gone"),
        (NCCL_ERROR.format("unhandled cuda error", "ncclUnhandledCudaError: Call to CUDA function failed."), None),
        (NCCL_ERROR.format("invalid usage", "ncclInvalidUsage: This usually reflects invalid usage."), None),
    ],
)
def test_of_nccls_errors_those_of_other_ranks_are_told_apart_from_this_ranks_own(text, told):
    found = peer_failure(dist.DistBackendError(text), [])
    assert found is None if told is None else found.startswith(told)


def test_a_killed_rank_is_named_before_those_that_ended_because_of_it():
    started = [subprocess.Popen(["sh", "-c", end]) for end in ("exit 1", "kill -9 $$", "sleep 60")]
    try:
        for process in started[:2]:
            process.wait()
        assert (
            peer_failure(dist.DistError("Connection closed by peer"), started) == "rank 2 is gone (killed by SIGKILL)"
        )
    finally:
        started[2].kill()
        started[2].wait()
