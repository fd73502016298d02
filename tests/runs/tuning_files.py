"""Pairs, prompts and reward functions for short runs of DPO and GRPO, and what kills such a run where it is told to."""

import json
from pathlib import Path

from tests.conftest import QUIET

JUDGES = """
import os, signal
def kills(completion_ids, **others):
    if os.environ.get("KILLED") == "judging":
        with open("kill_calls", "a+") as calls:
            if calls.write("x") and calls.tell() == 4: os.kill(os.getppid(), signal.SIGKILL)
    return [(ids[0] % 10) / 9 for ids in completion_ids]
def last_digit(completion_ids, **others):
    return [(ids[0] % 10) / 9 for ids in completion_ids]  # ten arms, of which 9 is the best
def breaks(completions, **others):
    with open("calls", "a+") as calls:
        if calls.write("x") and calls.tell() == 3: raise ValueError("the judge is ill")
    return [float(len(text)) for text in completions]
def nothing(completions, **others):
    return [0.0] * len(completions)
"""
KILLER = """
import os, signal
import torch
from lightning.pytorch import Callback
from dsv3_lightning.inference import rollout
PLACES = {"sampling": (rollout.Batch, "take", 40), "update": (torch.optim.AdamW, "step", 4)}
class Killer(Callback):
    def __init__(self):
        owner, name, last = PLACES.get(os.environ.get("KILLED"), (None, "", 0))
        original, calls = getattr(owner, name, None), []
        def dies(*args, **settings):
            calls.append(1)
            if len(calls) == last: os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **settings)
        if owner is not None: setattr(owner, name, dies)
"""
SMALL = [
    *QUIET, "callbacks.sample_text=null", "callbacks.router_probe=null", "callbacks.router_monitor=null",
    "data.sequence_length=32", "data.validation_fraction=0.2", "callbacks.run_report=null",
]  # fmt: skip


def write_files(base: Path) -> None:
    """Writes pairs.jsonl, prompts.jsonl, judges.py and killer.py, which the environment variable KILLED sets off."""
    numbers = [(a, b) for a in range(5) for b in range(4)]
    pairs = [{"messages": [{"role": "user", "content": f"{a} + {b}"}], "chosen": str(a + b), "rejected": "I won't say"}
             for a, b in numbers]  # fmt: skip
    prompts = [{"prompt": f"{a} + {b} =", "answer": a + b} for a, b in numbers]
    for name, lines in (("pairs", pairs), ("prompts", prompts)):
        (base / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (base / "judges.py").write_text(JUDGES, encoding="utf-8")
    (base / "killer.py").write_text(KILLER, encoding="utf-8")
