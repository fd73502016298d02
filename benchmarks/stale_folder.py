"""Ranks that are killed at random while one of them sees an old listing of the checkpoint folder.

python benchmarks/stale_folder.py [--kills 20] [--ranks 4] [--seed 0]

Network file systems may show a folder as it was some time ago. Each start ends by SIGKILL of a random rank, after some
steps; before the next one, the last rank gets a listing that is older than the newest checkpoint. Counted are the
starts after which ranks were at different steps, as a callback on each rank notes before its first step, and the
tensors at the end that differ from those of a run that was left alone.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dsv3_lightning.parallel.checkpoints.names import step_files
from dsv3_lightning.parallel.checkpoints.one_file import read_checkpoint

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "trainer.precision=32", "trainer.log_every_n_steps=1000", "data.sequence_length=16", "model.num_hidden_layers=2",
    "trainer.limit_val_batches=0", "callbacks.sample_text=null", "callbacks.throughput.peak_flops=1e11",
    "callbacks.checkpoint={every_n_steps: 2, keep: 3, keep_best: 0}", "callbacks.router_monitor=null",
    "callbacks.progress=null", "compute.compile=false",
)  # fmt: skip
SHARDS = "strategy={kind: fsdp2_ep, sharded_checkpoints: true, timeout_minutes: 1}"
FILE = "strategy={kind: fsdp2_ep, timeout_minutes: 1}"


class Starts:
    """Runs with a fixed number of ranks, started again and again. folder: of the runs, the listing and the notes."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.ranks, self.folder, self.chance = arguments.ranks, folder, random.Random(arguments.seed)
        self.listing, self.notes = folder / "listing.json", folder / "notes"
        self.notes.mkdir()

    def start(self, name: str, steps: int, strategy: str, number: int) -> list[subprocess.Popen]:
        """All ranks, as torchrun would start them, so that the one to kill is known."""
        port = str(20_000 + self.chance.randrange(10_000))
        common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1",
                               "MASTER_PORT": port, "WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks),
                               "GROUP_RANK": "0", "NODE_RANK": "0", "TORCHELASTIC_RUN_ID": "stale",
                               "STEP_NOTES": str(self.notes / str(number))}  # fmt: skip
        words = [*SETTINGS, strategy, f"trainer.max_steps={steps}", f"run.dir={self.folder}", f"run.name={name}",
                 f"data.cache_dir={self.folder / 'data'}",
                 "callbacks.notes={class_path: tests.parallel.step_notes.StepNotes}"]  # fmt: skip
        command = [sys.executable, "-m", "tests.parallel.stale", str(self.ranks - 1), str(self.listing), "run", "nano"]
        started = []
        for rank in range(self.ranks):
            with open(self.folder / f"{name}-{number}-{rank}.log", "w") as log:
                started.append(subprocess.Popen([*command, *words], stdout=log, stderr=subprocess.STDOUT,
                                                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))  # fmt: skip
        return started

    def steps_seen(self, number: int) -> dict[str, list[int]]:
        """{rank: the steps that it was at before each of its batches} in one start."""
        files = sorted((self.notes / str(number)).glob("rank*"))
        return {file.name: [int(word) for word in file.read_text().split()] for file in files}

    def kill_one(self, started: list[subprocess.Popen], number: int) -> str:
        """Lets them train for some steps and kills one; the others end by themselves. Returns what happened."""
        wanted, seen, end = self.chance.randrange(1, 7), {}, time.monotonic() + 300
        while len(seen.get("rank0", [])) < wanted and all(one.poll() is None for one in started):
            seen = self.steps_seen(number)
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        time.sleep(self.chance.uniform(0, 0.5))
        victim = self.chance.randrange(self.ranks)
        started[victim].kill()
        for one in started:
            try:
                one.wait(timeout=120)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()
        return f"rank {victim} killed"

    def show_an_old_listing(self, checkpoints: Path) -> str:
        """Lists the folder without its newest checkpoints for the last rank."""
        files = step_files(checkpoints)
        left_out = {path.name for path in files[: self.chance.randrange(1, 3)]}
        self.listing.write_text(json.dumps([name for name in os.listdir(checkpoints) if name not in left_out]))
        return ", ".join(sorted(left_out)) or "nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-file", action="store_true", help="checkpoints in one file, not in shards")
    arguments = parser.parse_args()
    steps, strategy, mixed = 4 * arguments.kills, FILE if arguments.one_file else SHARDS, 0
    with tempfile.TemporaryDirectory() as name:
        starts = Starts(arguments, Path(name))
        killed = starts.folder / "killed/checkpoints"
        for number in range(arguments.kills + 1):
            started = starts.start("killed", steps, strategy, number)
            if number < arguments.kills:
                what = starts.kill_one(started, number)
            else:
                what = f"ends with {[one.wait() for one in started]}"
            begun = {seen[0] for seen in starts.steps_seen(number).values() if seen}
            mixed += len(begun) > 1
            hidden = starts.show_an_old_listing(killed) if killed.is_dir() else "nothing"
            print(f"start {number}: began at step {sorted(begun)}, {what}; hidden next: {hidden}", flush=True)
        starts.listing.unlink(missing_ok=True)
        codes = [one.wait() for one in starts.start("alone", steps, strategy, arguments.kills + 1)]
        paths = [starts.folder / run / f"checkpoints/step={steps}.ckpt" for run in ("alone", "killed")]
        one, other = (read_checkpoint(path)["state_dict"] for path in paths)
        different = [key for key, value in one.items() if not torch.equal(value, other[key])]
    print(f"{arguments.kills} kills on {arguments.ranks} ranks: {mixed} starts at different steps; {len(different)} of "
          f"{len(one)} tensors differ from the run that was left alone (which ended with {codes})")  # fmt: skip
    return 1 if mixed or different else 0


if __name__ == "__main__":
    sys.exit(main())
