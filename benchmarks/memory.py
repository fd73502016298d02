"""Peak memory per rank on 1, 2 and 4 processes: planned, counted by a dry run, and measured.

python benchmarks/memory.py

A model of 64M parameters in fp32 under `fsdp2`, three steps of 8 samples over all ranks. The measured
value is a process's peak (VmHWM) minus its memory before the weights were made. Linux only.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from lightning.pytorch import Callback

from dsv3_lightning.commands.plan_cluster import work_of
from dsv3_lightning.config.checks import mesh_strategy
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.parallel.mesh import mesh_shape
from dsv3_lightning.planning.cluster import rank_memory

ROOT = Path(__file__).parents[1]
MODEL = (
    "model.hidden_size=512", "model.num_hidden_layers=4", "model.num_attention_heads=8", "model.vocab_size=4096",
    "model.n_routed_experts=16", "model.moe_intermediate_size=512", "model.intermediate_size=2048",
    "model.kv_lora_rank=128", "model.q_lora_rank=null", "model.qk_nope_head_dim=32", "model.qk_rope_head_dim=32",
    "model.v_head_dim=32", "model.max_position_embeddings=512", "data.sequence_length=256", "data.batch_size=8",
    "data.vocab_size=1024", "trainer.precision=32", "trainer.max_steps=3", "trainer.limit_val_batches=0",
    "strategy={kind: fsdp2}",
)  # fmt: skip
QUIET = ("callbacks={sample_text: null, router_monitor: null, router_probe: null, checkpoint: null}",
         "callbacks.peak={class_path: benchmarks.memory.Peak}", "callbacks.throughput.peak_flops=1e11")  # fmt: skip


class Peak(Callback):
    """Prints the peak memory of the process from `setup` to the end of training, minus that before, in bytes."""

    def setup(self, trainer, pl_module, stage):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.before = status("VmRSS")

    def on_train_end(self, trainer, pl_module):
        print(f"peak of rank {trainer.global_rank}: {status('VmHWM') - self.before}", flush=True)


def status(key: str) -> int:
    """A value of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measured(ranks: int, folder: str) -> int:
    """The maximum peak over ranks, in bytes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
               "dsv3_lightning", "run", "nano", *MODEL, *QUIET, f"trainer.devices={ranks}", f"run.dir={folder}",
               f"run.name=on{ranks}"]  # fmt: skip
    # Freed memory is returned at once, so resident memory is what is in use.
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
                   "MALLOC_TRIM_THRESHOLD_": "0"}  # fmt: skip
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return max(map(int, re.findall(r"peak of rank \d+: (\d+)", done.stdout)))


def main() -> None:
    from dsv3_lightning.training.dry_run import dry_run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2, 4), metavar="N", help="numbers of processes")
    arguments = parser.parse_args()
    print("| ranks | planned | counted | measured | planned / measured |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in arguments.ranks:
            config = check(compose(["nano"], [*MODEL, f"trainer.devices={ranks}", "run.name=x"]).tree)
            strategy, work = mesh_strategy(config.strategy), work_of(config, ranks)
            assert strategy is not None
            shape, T = mesh_shape(strategy, ranks, ranks, config.model), work.sequence_length
            planned = rank_memory(config.model, shape, strategy, work).total
            counted = dry_run(config.model, config.optimizer, strategy, shape, work.tokens // T, T, work.precision,
                              work.policy).peak  # fmt: skip
            used = measured(ranks, folder)
            row = [f"{value / 1e6:,.0f} MB" for value in (planned, counted, used)]
            print(f"| {ranks} | {' | '.join(row)} | {planned / used:.2f} |", flush=True)


if __name__ == "__main__":
    main()
