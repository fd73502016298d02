"""Leak test: memory of a run of 2,000 steps on 1, 2 and 4 processes, with all monitors and a validation every 50 steps.

python benchmarks/soak.py [--ranks 1 2 4] [--steps 2000]

A leak per step, such as a logged tensor that keeps its graph, shows as growth after the first quarter. Linux only.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from lightning.pytorch import Callback

ROOT = Path(__file__).parents[1]
RUN = (
    "data.sequence_length=16", "data.batch_size=4", "trainer.precision=32", "trainer.log_every_n_steps=5",
    "trainer.val_check_interval=50", "trainer.limit_val_batches=1", "callbacks.router_monitor.every_n_steps=50",
    "callbacks.router_monitor.per_layer=true", "callbacks.weight_average={decay: 0.99}",
    "callbacks.checkpoint.every_n_steps=100", "callbacks.throughput.peak_flops=1e11",
    "callbacks.sample_text={every_n_steps: 100, prompts: [a], max_new_tokens: 2, temperature: 1.0}",
)  # fmt: skip


class Memory(Callback):
    """Prints the memory in use after the given steps, in bytes."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps:
            print(f"rank {trainer.global_rank} step {trainer.global_step}: {memory_in_use()} bytes", flush=True)


def memory_in_use() -> int:
    """Resident bytes after garbage collection and the release of glibc's free lists."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def measured(ranks: int, steps: list[int], folder: str) -> dict[int, list[int]]:
    """Bytes in use by step, one value for each rank."""
    callback = f"callbacks.memory={{class_path: benchmarks.soak.Memory, init_args: {{steps: {steps}}}}}"
    strategy = "auto" if ranks == 1 else "{kind: fsdp2_ep, sharded_checkpoints: true}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
               "dsv3_lightning", "run", "nano", *RUN, callback, f"strategy={strategy}", f"trainer.devices={ranks}",
               f"trainer.max_steps={steps[-1]}", f"run.dir={folder}", f"run.name=on{ranks}"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(int(rank), int(step)): int(used)
             for rank, step, used in re.findall(r"rank (\d+) step (\d+): (\d+) bytes", done.stdout)}  # fmt: skip
    return {step: [found[rank, step] for rank in range(ranks)] for step in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    steps = [arguments.steps // 4, arguments.steps // 2, arguments.steps]
    print(
        f"| ranks | {' | '.join(f'step {step:,}' for step in steps)} | worst growth |\n| --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as folder:
        for ranks in arguments.ranks:
            used = measured(ranks, steps, folder)
            growth = max(
                end / start for step in steps[1:] for start, end in zip(used[steps[0]], used[step], strict=True)
            )
            row = [f"{max(used[step]) / 1e6:,.1f} MB" for step in steps]
            print(f"| {ranks} | {' | '.join(row)} | {growth - 1:+.2%} |", flush=True)


if __name__ == "__main__":
    main()
