"""What `python benchmarks/pipelines.py` does, whose arguments it takes."""

import argparse
import datetime
import os
import sys
import tempfile
from itertools import permutations, product
from pathlib import Path

import torch

from dsv3_lightning.parallel.checkpoints.one_file import read_checkpoint
from tests.conftest import QUIET, Nano
from tests.parallel.pipeline.cases import MESHES, PAIRS, SCHEDULES, Case, case, compare, make_runs, resumed
from tests.parallel.pipeline.faults import kill_once, killer, pipeline_under_torchrun
from tests.parallel.pipeline.killer import ACTIONS
from tests.runs.compare import assert_same_curves

BOTH = (("depth1", "none"), ("depth2", "selective"), ("dense", "full"), ("depth1", "full"), ("depth1", "selective"))


def gradient_cases() -> dict[str, Case]:
    found = {
        f"{schedule} on {ranks} {model} {kept}": case(ranks, schedule, model, kept)
        for ranks, schedule, (model, kept) in product((2, 4), SCHEDULES, (*BOTH, ("muon", "none")))
    }
    for schedule, mesh in product(SCHEDULES, MESHES):
        found[f"{schedule} on 2 x {mesh} depth1"] = case(4, schedule, mesh=mesh, stages=2)
        found[f"{schedule} on 2 x {mesh} depth2 full"] = case(4, schedule, "depth2", "full", mesh, 2)
    for mesh, (model, kept) in product(PAIRS, BOTH[:2] + BOTH[3:]):
        found[f"dualpipev on 2 x {mesh} {model} {kept}"] = case(4, "dualpipev", model, kept, mesh, 2)
    return found


def gradients(nano: Nano, arguments: argparse.Namespace) -> bool:
    cases = {name: one for name, one in gradient_cases().items() if arguments.only in name}
    runs = make_runs(nano, cases, arguments.steps, {}, timeout=7200)
    print(f"| {arguments.steps} steps | largest error of a gradient or weight, of its norm |\n| --- | --- |")
    errors = {name: compare(nano, runs, name, one.model, arguments.steps) for name, one in cases.items()}
    for name, error in errors.items():
        print(f"| {name} | {error:.1e} |")
    return max(errors.values()) < 5e-5


def resume(nano: Nano, arguments: argparse.Namespace) -> bool:
    """Every pair of kinds: curves within 1e-5 of the run of one process that was never stopped."""
    kinds = {
        "1 process": Case(1, "depth1", ()),
        "2 stages": case(2, "zbv", sharded=True),
        "4 stages": case(4, "dualpipev"),
        "2 stages x ep2": case(4, "zbv", mesh="ep2", stages=2, sharded=True),
        "FSDP2 on 2": Case(2, "depth1", ("strategy=fsdp2",)),
        "EP2": Case(2, "depth1", ("strategy={kind: fsdp2_ep, sharded_checkpoints: true}",)),
    }
    pairs = {f"{one} -> {other}": (one, other) for one, other in permutations(kinds, 2) if "stages" in one + other}
    on = {
        name: resumed("depth1" if one == "1 process" else one, 4, kinds[other]) for name, (one, other) in pairs.items()
    }
    runs = make_runs(nano, {name: kind for name, kind in kinds.items() if kind.words}, 8, on, timeout=7200)
    print("| resumed after step 4 of 8 | curves within 1e-5 |\n| --- | --- |")
    for name in on:
        assert_same_curves(runs["depth1"], runs[name], 1e-5, after=4)
        print(f"| {name} | yes |")
    return True


def kills(nano: Nano, arguments: argparse.Namespace) -> bool:
    """Lightning's own start of the ranks: all are gone, and how soon. torchrun: the weights at the end."""
    ranks = arguments.ranks
    print("| schedule | killed in | rank | all gone after | line |\n| --- | --- | --- | --- | --- |")
    for schedule, actions in (("dualpipev", ACTIONS), ("zbv", ("I", "W")), ("1f1b", ("F", "B"))):
        for number, action in enumerate(actions):
            victim = 0 if number % 4 == 3 else ranks - 1
            line, seconds = kill_once(nano, f"{schedule}-{action}", ranks, schedule, action, victim)
            print(f"| {schedule} | {action} | {victim} | {seconds:.1f} s | {line} |", flush=True)
    plan = [(2 + number, action, number % ranks) for number, action in enumerate(ACTIONS)]
    steps = len(plan) + 2
    alone = pipeline_under_torchrun(nano, "alone", ranks, "dualpipev", steps)
    killed = pipeline_under_torchrun(nano, "killed", ranks, "dualpipev", steps, killer(nano.base / "killed", plan))
    assert (alone.code, killed.code) == (0, 0), killed.output[-6000:]
    one, other = (
        read_checkpoint(run.folder / f"checkpoints/step={steps}.ckpt")["state_dict"] for run in (alone, killed)
    )
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    died = len(list((nano.base / "killed").iterdir()))
    print(f"\nkilled {died} times under torchrun, once in each: {len(different)} of {len(one)} tensors differ from the "
          "undisturbed run's")  # fmt: skip
    return not different


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("gradients", "resume", "kills"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="")
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        library = Path(os.__file__).parent
        paths = ",".join(str(library / f"{module}.py") for module in ("argparse", "ast", "difflib", "tarfile"))
        data = [f"data.paths=[{paths}]", f"data.cache_dir={name}/cache", "data.validation_fraction=0.2"]
        print(f"{datetime.date.today()}, python benchmarks/pipelines.py {' '.join(sys.argv[1:])}\n", flush=True)
        good = {"gradients": gradients, "resume": resume, "kills": kills}[arguments.what](
            Nano(Path(name), [*data, *QUIET, "callbacks.sample_text.temperature=0"]), arguments
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
