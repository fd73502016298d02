"""The environment decides rank and world size as Lightning does, and what is left over in it is ignored or named."""

import os
import subprocess
import sys

import pytest

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.launch import fill_in, rank_of
from tests.conftest import ROOT

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = MEET | {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
}
SRUN = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_JOB_NAME": "train"}  # fmt: skip
HAND = MEET | {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "RANK": "1"}


def trainer(devices=None, num_nodes=None):
    return {"devices": devices, "num_nodes": num_nodes}


@pytest.mark.parametrize(
    ("environment", "settings", "devices", "nodes", "rank"),
    [
        ({}, trainer(), 1, 1, 0),
        ({}, trainer("auto"), "auto", 1, 0),
        (TORCHRUN, trainer(), 2, 2, 3),
        (TORCHRUN, trainer("auto"), 2, 2, 3),
        (TORCHRUN, trainer(2, 2), 2, 2, 3),
        (TORCHRUN | SRUN, trainer(), 2, 2, 3),  # torchrun inside of a SLURM job
        (SRUN, trainer(), 2, 2, 2),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, trainer(), 1, 1, 0),  # a shell in a job
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, trainer(), 1, 1, 0),
        (HAND, trainer(), 2, 1, 1),
        (HAND, trainer(2, 1), 2, 1, 1),
        (MEET | {"NODE_RANK": "1"}, trainer(2, 2), 2, 2, 2),
        (MEET | {"NODE_RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, trainer(2, 2), 2, 2, 3),
        (MEET | {"GROUP_RANK": "1"}, trainer(2, 2), 2, 2, 2),
        ({"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_LOCAL_RANK": "1"}, trainer(), 2, 1, 1),
        # left over, and without meaning to Lightning
        ({"RANK": "1"}, trainer(), 1, 1, 0),
        ({"WORLD_SIZE": "2"}, trainer(), 1, 1, 0),
        ({"RANK": "0", "WORLD_SIZE": "1"} | MEET, trainer(), 1, 1, 0),
        ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}, trainer(), 1, 1, 0),
        ({"OMPI_COMM_WORLD_RANK": "1", "PMI_RANK": "1", "JSM_NAMESPACE_RANK": "1"}, trainer(), 1, 1, 0),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, trainer(2), 2, 1, 0),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}, trainer(), 1, 1, 0),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"} | MEET, trainer(), 1, 1, 0),  # Lightning's own, after a run
    ],
)  # fmt: skip
def test_devices_nodes_and_rank(environment, settings, devices, nodes, rank):
    settled = fill_in(settings, environment)
    assert settled == {"devices": devices, "num_nodes": nodes}
    assert rank_of(settled, environment) == rank


@pytest.mark.parametrize(
    ("environment", "settings", "named"),
    [
        ({"RANK": "abc"}, trainer(), "RANK='abc'"),
        ({"LOCAL_RANK": ""}, trainer(), "LOCAL_RANK=''"),
        ({"SLURM_PROCID": "-1"}, trainer(), "SLURM_PROCID='-1'"),
        ({"TORCHELASTIC_RUN_ID": "x"}, trainer(), "TORCHELASTIC_RUN_ID=x"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, trainer(), "MASTER_PORT"),
        (TORCHRUN | {"RANK": "4"}, trainer(), "RANK=4"),
        (TORCHRUN, trainer(1, 1), "WORLD_SIZE=4"),
        (TORCHRUN, trainer(4, 2), "WORLD_SIZE=4"),
        (SRUN, trainer(1, 1), "SLURM_NTASKS=4"),
        ({"SLURM_NTASKS": "1"}, trainer(2), "SLURM_NTASKS=1"),
        ({"SLURM_NTASKS": "4"}, trainer(), "SLURM_NTASKS=4"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, trainer(),
         "OMPI_COMM_WORLD_SIZE=2"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "0"}, trainer(), "PMI_SIZE=2"),
        ({"RANK": "1", "WORLD_SIZE": "2"} | MEET, trainer(), "RANK=1"),  # one process per pod, without LOCAL_RANK
        ({"LOCAL_RANK": "1"}, trainer(), "LOCAL_RANK=1"),
        ({"LOCAL_RANK": "0"}, trainer(2), "LOCAL_RANK=0"),
        ({"NODE_RANK": "1"}, trainer(), "NODE_RANK=1"),
        ({"GROUP_RANK": "1"}, trainer(), "GROUP_RANK=1"),
        (MEET, trainer(1, 2), "NODE_RANK is not set"),
        ({"NODE_RANK": "0"}, trainer(1, 2), "MASTER_ADDR is not set"),
        ({"RANK": "1"}, trainer(2), "RANK=1"),
        (HAND | {"RANK": "0"}, trainer(), "RANK=0"),
        (HAND, trainer(1), "LOCAL_RANK=1"),
        (HAND | {"LOCAL_RANK": "0", "RANK": "0"}, trainer(1), "WORLD_SIZE=2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_name(environment, settings, named):
    with pytest.raises(ConfigError) as caught:
        rank_of(fill_in(settings, environment), environment)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_checked_config_has_the_launchers_numbers(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    settings = check(compose(["nano"], []).tree).trainer
    assert (settings["devices"], settings["num_nodes"]) == (2, 2)


@pytest.mark.parametrize(
    ("variables", "precision"),
    [({"RANK": "1", "TORCHELASTIC_RESTART_COUNT": "1"}, "32"), ({"SLURM_PROCID": "1", "WORLD_SIZE": "2"}, "auto")],
)
def test_a_process_with_variables_left_over_is_a_whole_run(nano, variables, precision, monkeypatch):
    """Lightning takes its rank from the first of them when it is imported, and from then on stays silent."""
    run = nano.command("whole", "trainer.max_steps=2", f"trainer.precision={precision}", **variables)
    assert run.code == 0, run.output
    assert (run.folder / "config.yaml").is_file() and run.scalars() and list(run.folder.glob("tokenizer*.json"))
    assert f"report: {os.path.relpath(run.folder, nano.base)}/report.md" in run.output


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_torchrun_without_settings_is_one_run(nano, strategy, tmp_path):
    """All other strategies are decided by the same numbers."""
    output = torchrun(nano, tmp_path, ("trainer.max_steps=2", f"strategy={strategy}"))
    assert output.returncode == 0, output.stderr
    assert output.stdout.count("step 2/2") == 1 and "2 x cpu" in (nano.base / "runs/t/report.md").read_text()


def test_a_contradiction_under_torchrun_is_one_line_of_one_rank(nano, tmp_path):
    output = torchrun(nano, tmp_path, ("trainer.max_steps=2", "trainer.devices=4"))
    lines = [line for line in output.stderr.splitlines() if line.startswith("dsv3: error:")]
    assert output.returncode != 0 and len(lines) == 1 and "WORLD_SIZE=2" in lines[0], output.stderr
    assert "exitcode  : 2" in output.stderr


def torchrun(nano, folder, words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "dsv3_lightning", *nano.arguments("t", words)]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=folder,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
