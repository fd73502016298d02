"""Fault injection: a run whose ranks are killed at random must end with the weights of an undisturbed run.

python benchmarks/faults.py [--kills 5] [--ranks 4] [--seed 0]

Runs under `torchrun --max-restarts` with expert parallelism and sharded checkpoints every 5 steps. Each kill sends
SIGKILL to one rank, 0 to 10 seconds after the first step since the previous kill.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from dsv3_lightning.parallel.checkpoints.one_file import read_checkpoint

ROOT = Path(__file__).parents[1]
STEPS = 60
SETTINGS = (
    f"trainer.max_steps={STEPS}", "trainer.precision=32", "trainer.log_every_n_steps=1", "data.sequence_length=32",
    "trainer.val_check_interval=20", "trainer.limit_val_batches=1", "callbacks.sample_text=null",
    "callbacks.checkpoint={every_n_steps: 5, keep: 2, keep_best: 1}", "callbacks.throughput.peak_flops=1e11",
    "strategy={kind: fsdp2_ep, expert_parallel: 2, sharded_checkpoints: true}",
    "compute.compile=false",  # of two runs only the later one may find compiled functions, which round otherwise
)  # fmt: skip


def start(name: str, arguments: argparse.Namespace, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}",
               f"--max-restarts={arguments.kills}", "-m", "dsv3_lightning", "run", "nano", *SETTINGS,
               f"trainer.devices={arguments.ranks}", f"run.dir={folder}", f"run.name={name}"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def kill_now_and_then(process: subprocess.Popen, log: Path, arguments: argparse.Namespace) -> int:
    """Kills ranks until the run ends; returns the number of kills."""
    chance = random.Random(arguments.seed)
    for number in range(arguments.kills):
        seen = len(log.read_text())
        while "\nstep " not in log.read_text()[seen:] and process.poll() is None:
            time.sleep(0.1)
        time.sleep(chance.uniform(0, 10))
        if process.poll() is not None:
            return number
        rank = chance.randrange(arguments.ranks)
        victims = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
        if rank < len(victims):
            print(f"killing rank {rank} after: {log.read_text().splitlines()[-1][:60]}", flush=True)
            victims[rank].kill()
    return arguments.kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert start("alone", arguments, folder).wait() == 0, (folder / "alone.log").read_text()
        process = start("killed", arguments, folder)
        kills = kill_now_and_then(process, folder / "killed.log", arguments)
        assert process.wait() == 0, (folder / "killed.log").read_text()
        paths = [folder / run / f"checkpoints/step={STEPS}.ckpt" for run in ("alone", "killed")]
        one, other = (read_checkpoint(path)["state_dict"] for path in paths)
        different = [key for key, value in one.items() if not torch.equal(value, other[key])]
        print(f"killed {kills} times; {len(different)} of {len(one)} tensors differ from the undisturbed run's")
        return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
