"""How runs are started, and how they end where one of their processes does not: at once, all, with one line."""

import os
import signal
import stat
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT
from tests.parallel.conftest import free_port, start_ranks
from tests.runs.test_interruptions import wait_for

LONG = ("trainer.devices=2", "trainer.max_steps=5000", "data.sequence_length=16")


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_dies_takes_the_others_with_it_and_is_named(nano, ranks):
    """In a save, in a validation and in a step (pytorch/pytorch#17113); the same command resumes."""
    victim = ranks - 1
    settings = (
        f"trainer.devices={ranks}", "strategy={kind: fsdp2_ep, sharded_checkpoints: true}", "trainer.max_steps=9",
        "trainer.val_check_interval=6", "data.sequence_length=16", "callbacks.checkpoint.every_n_steps=4",
        f"callbacks.killer={{class_path: tests.parallel.killer.Killer, init_args: {{folder: {nano.base / 'kills'}, "
        f"kills: [[4, save, {victim}], [6, validation, {victim}], [7, step, {victim}]]}}}}",
    )  # fmt: skip
    new = "starting a new run"
    moments = {"4-save": new, "6-validation": new, "7-step": "continuing after step 4"}
    for moment, begun in moments.items():
        process = nano.start("dying", *settings)
        family = []
        while process.poll() is None and not (nano.base / f"kills/{moment}-{victim}").exists():
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            time.sleep(0.05)
        output, _ = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert len(family) >= ranks and not alive and process.returncode == 1, output
        named = f"dsv3: rank 0 stops: rank {victim} is gone (killed by SIGKILL); the same command resumes from"
        assert named in output and begun in output and "Traceback" not in output, output


def test_a_rank_that_hangs_is_given_up(nano, tmp_path):
    words = nano.arguments("hanging", (*LONG, "strategy={kind: fsdp2, timeout_minutes: 0.2}"))
    first, second = start_ranks(2, tmp_path, ["dsv3_lightning", *words])
    log = tmp_path / "rank0.log"
    try:
        while "step 3/" not in log.read_text() and first.poll() is None:
            time.sleep(0.1)
        second.send_signal(signal.SIGSTOP)
        assert first.wait(timeout=60) == 1
    finally:
        first.kill()
        second.kill()
    output = log.read_text()
    assert "dsv3: rank 0 stops: another rank did not answer within strategy.timeout_minutes" in output, output
    assert "Traceback" not in output, output


def test_offloading_to_the_cpu_is_refused_on_one(nano, capsys):
    assert nano.run("offloaded", "strategy={kind: fsdp2, cpu_offload: true}", "trainer.accelerator=cpu").code == 2
    assert "strategy.cpu_offload=true: this run is on the CPU; offloading is for GPUs" in capsys.readouterr().err


def test_data_that_cannot_be_prepared_ends_all_ranks_with_one_line(nano, tmp_path):
    """The others would wait for the first rank as long as a collective may take."""
    (tmp_path / "bad.jsonl").write_text('{"other": "no text"}\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "dsv3_lightning", *nano.arguments("bad", ("trainer.devices=2", "strategy=fsdp2")),
               f"data.paths=[{tmp_path / 'bad.jsonl'}]"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("dsv3: error:")]
    assert len(lines) == 1 and "bad.jsonl" in lines[0], done.stderr


SRUN = """#!/usr/bin/env bash
shift
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 "$@" & tasks+=($!); done
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""


def test_a_slurm_job_that_is_asked_to_stop_saves_and_queues_itself_again(nano, tmp_path):
    """With stand-ins for srun and scontrol: two tasks under SLURM's environment, SIGUSR1 to both."""
    programs = {"srun": SRUN, "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n',
                "dsv3": f'#!/bin/sh\nexec {sys.executable} -m dsv3_lightning "$@"\n'}  # fmt: skip
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "dsv3", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
             "SLURM_JOB_NUM_NODES": "1", "CHECK": "0", "SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1"}  # fmt: skip
    _, *words = nano.arguments("queued", (*LONG, "strategy={kind: fsdp2, sharded_checkpoints: true}"))
    job = subprocess.Popen(
        ["bash", str(ROOT / "configs/launch/slurm.sbatch"), *words], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "MASTER_PORT": str(free_port()),
                                  "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for(job, "step 3/")
        for task in psutil.Process(job.pid).children(recursive=True):
            if "python" in task.name():
                task.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    finally:
        for task in psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []:
            task.kill()
        job.kill()
    assert job.returncode == 128 + signal.SIGUSR1, output
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    stopped = [line for line in output.splitlines() if "stopped by SIGUSR1 after step" in line]
    (checkpoint,) = (nano.base / "runs/queued/checkpoints").glob("step=*.ckpt")
    assert stopped and f"step {checkpoint.stem.split('=')[1]}, which is saved" in stopped[0] and checkpoint.is_dir()
