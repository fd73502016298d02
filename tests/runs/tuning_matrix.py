"""What `python benchmarks/tuning.py` does, whose arguments it takes."""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dsv3_lightning.parallel.checkpoints.one_file import read_checkpoint
from tests.conftest import ROOT
from tests.runs.tuning_files import SMALL, write_files

COMMON = ["trainer.max_steps=4", "callbacks.checkpoint={every_n_steps: 1, keep: 9, keep_best: 0}", "data.batch_size=4",
          "optimizer.lr=1e-3", "trainer.val_check_interval=4", "callbacks.progress=null"]  # fmt: skip
REWARDS = "rewards: ['judges:last_digit'], group_size: 4, max_new_tokens: 6"
OBJECTIVES = {
    "dpo": "dpo={beta: 0.5}",
    "dpo by length": "dpo={beta: 5, by_length: true}",
    "grpo": f"grpo={{{REWARDS}, variant: grpo, beta: 0.1, updates: 2}}",
    "dr_grpo": f"grpo={{{REWARDS}, variant: dr_grpo, scale: none}}",
    "dapo": f"grpo={{{REWARDS}, variant: dapo, temperature: 0.7, replay_routes: true}}",
}
LAYOUTS = {
    "4 micro-batches": ["trainer.accumulate_grad_batches=4"],
    "2 ranks, DDP": ["trainer.devices=2"],
    "2 ranks, FSDP2": ["trainer.devices=2", "strategy=fsdp2"],
    "2 ranks, FSDP2 and EP": ["trainer.devices=2", "strategy={kind: fsdp2_ep, expert_parallel: 2}"],
    "2 ranks, FSDP2, 2 micro-batches": ["trainer.devices=2", "strategy=fsdp2", "trainer.accumulate_grad_batches=2"],
}


def start(base: Path, name: str, objective: str, *settings: str) -> subprocess.Popen:
    lines = base / ("pairs.jsonl" if objective.startswith("dpo") else "prompts.jsonl")
    words = [f"run.dir={base / 'runs'}", f"run.name={name}", *SMALL, *COMMON, OBJECTIVES[objective],
             f"init_from={base / 'runs/start'}", f"data.paths=[{lines}]", *settings]  # fmt: skip
    return launch(base, *words)


def launch(base: Path, *words: str) -> subprocess.Popen:
    path = os.pathsep.join((str(ROOT), str(base)))
    return subprocess.Popen(
        [sys.executable, "-m", "dsv3_lightning", "run", "nano", *words], cwd=base, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip


def finished(process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    assert process.returncode == 0, output


def weights(base: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    return read_checkpoint(base / "runs" / name / f"checkpoints/step={step}.ckpt")["state_dict"]


def steps(base: Path) -> bool:
    print(f"| after 2 steps | {' | '.join(LAYOUTS)} |\n| --- |{' ---: |' * len(LAYOUTS)}", flush=True)
    worst = 0.0
    for objective in OBJECTIVES:
        finished(start(base, objective, objective))
        alone, cells = weights(base, objective, 2), []
        for layout, settings in LAYOUTS.items():
            finished(start(base, f"{objective}, {layout}", objective, *settings))
            other = weights(base, f"{objective}, {layout}", 2)
            errors = [float((other[key] - one).abs().max() / one.abs().max().clamp(min=1e-6))
                      for key, one in alone.items() if one.is_floating_point()]  # fmt: skip
            cells.append(max(errors))
        worst = max(worst, *cells)
        print(f"| {objective} | {' | '.join(f'{cell:.1e}' for cell in cells)} |", flush=True)
    return worst < 1e-2


def kills(base: Path, count: int, chance: random.Random) -> bool:
    right = True
    for objective in ("dpo", "grpo"):
        settings = ["trainer.max_steps=30", "callbacks.checkpoint={every_n_steps: 2, keep: 2, keep_best: 1}"]
        begun = time.monotonic()
        finished(start(base, f"{objective} alone", objective, *settings))
        seconds, killed = time.monotonic() - begun, 0
        while True:
            process = start(base, f"{objective} killed", objective, *settings)
            try:
                process.wait(chance.uniform(0.2, 1.0) * seconds if killed < count else None)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            output, _ = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -9, output
        one, other = (weights(base, f"{objective} {name}", 30) for name in ("alone", "killed"))
        different = [key for key, value in one.items() if not torch.equal(value, other[key])]
        print(f"{objective}: killed {killed} times; {len(different)} of {len(one)} tensors differ", flush=True)
        right &= not different
    return right


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("steps", "kills"))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        write_files(base)
        own = [f"data.paths=[{ROOT / 'dsv3_lightning/model'}]", "trainer.max_steps=2"]
        finished(launch(base, f"run.dir={base / 'runs'}", "run.name=start", *SMALL, *own))
        if arguments.what == "steps":
            return 0 if steps(base) else 1
        return 0 if kills(base, arguments.kills, random.Random(arguments.seed)) else 1


if __name__ == "__main__":
    sys.exit(main())
