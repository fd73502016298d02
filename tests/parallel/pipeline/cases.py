"""Runs through pipelines, each beside the run of one process whose numbers it must have: for tests and benchmarks."""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from tests.conftest import Nano, Run
from tests.parallel.conftest import runs_on_ranks
from tests.runs.compare import assert_same_curves

COMMON = (
    "trainer.gradient_clip_val=0.3",  # below every norm of these runs
    "trainer.limit_val_batches=1",
    "data.sequence_length=24",
    "data.mask_document_ends=true",  # each micro-batch has another number of valid targets
    "model.num_hidden_layers=8",
    "model.vocab_size=512",
    "optimizer.eps=1e-3",  # Adam then moves smoothly with the gradient, and rounding stays rounding
    "callbacks.sample_text.max_new_tokens=3",
    "callbacks.weight_average={decay: 0.5}",
)
MODELS = {
    "depth1": ("loss={balance: [sequence, batch], balance_factor: [0.01, 0.01]}",),
    "depth2": ("model.num_nextn_predict_layers=2", "loss={balance: sequence, balance_factor: 0.01}"),
    "dense": (
        "model.attention=gqa",
        "model.kv_lora_rank=0",
        "model.q_lora_rank=null",
        "model.num_key_value_heads=2",
        "model.first_k_dense_replace=8",
        "model.num_nextn_predict_layers=0",
        "loss.balance=none",
        "callbacks.expert_bias=null",
        "callbacks.router_monitor=null",
        "callbacks.router_probe=null",
        "optimizer.kind=muon",
    ),
}
MODELS["muon"] = (*MODELS["depth1"], "optimizer.kind=muon")
MODELS["short"] = (*MODELS["depth2"], "model.num_hidden_layers=4")  # for two stages
SCHEDULES = ("zbv", "dualpipev", "interleaved_zero_bubble", "interleaved_1f1b", "1f1b")
MESHES = {"fsdp2": "kind: fsdp2", "ep2": "kind: fsdp2_ep, expert_parallel: 2", "hsdp": "kind: hsdp, dp_shard: 1"}
PAIRS = {"ep2 in pairs": "kind: fsdp2_ep, expert_parallel: 2, overlap: pairs"}  # of dualpipev


class Case(NamedTuple):
    """A run on `ranks` processes. model: of MODELS. words: its other settings."""

    ranks: int
    model: str
    words: tuple[str, ...]


def case(
    ranks: int, schedule: str, model: str = "depth1", checkpointing: str = "none", mesh: str = "fsdp2", stages: int = 0,
    sharded: bool = False, waiting: int | None = None,
) -> Case:  # fmt: skip
    """stages: the pipeline's ranks; 0: all. sharded, waiting: as strategy.sharded_checkpoints and waiting_weights."""
    stages = stages or ranks
    block = f"pipeline_parallel: {stages}, schedule: {schedule}, micro_batches: {2 * stages}"  # DualPipeV's least
    block += f", waiting_weights: {waiting}" if waiting else ""
    words = (
        f"strategy={{{(MESHES | PAIRS)[mesh]}, {block}, sharded_checkpoints: {str(sharded).lower()}}}",
        f"compute.activation_checkpointing={checkpointing}",
    )
    return Case(ranks, model, words)


def traced(one: Case) -> Case:
    return one._replace(words=(*one.words, "callbacks.pipeline_trace={every_n_steps: 3}"))


def folder_of(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def recorded(nano: Nano, name: str) -> str:
    where = nano.base / "recorded" / folder_of(name)
    return f"callbacks.recorder={{class_path: tests.parallel.recorder.Recorder, init_args: {{folder: {where}}}}}"


def resumed(start: str, at: int, then: Case) -> tuple[str, int, Case]:
    """A run that goes on from another's checkpoint of this step."""
    return start, at, then


def make_runs(
    nano: Nano, cases: dict[str, Case], steps: int, on: dict[str, tuple[str, int, Case]], timeout: float = 600
) -> dict[str, Run]:  # fmt: skip
    """The runs of the cases, one of one process for each model, by the model's name, and those that go `on`.

    Runs of equally many ranks are made in the same processes, one after the other.
    """
    common = (*COMMON, f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps // 2}",
              "callbacks.checkpoint={every_n_steps: 2, keep: 9, keep_best: 0}")  # fmt: skip
    found = {}
    for model in {one.model for one in cases.values()}:
        found[model] = nano.run(model, *common, *MODELS[model], recorded(nano, model))
        assert found[model].code == 0
    waiting: dict[str, tuple[Case, tuple[str, ...], str]] = {
        name: (one, (recorded(nano, name),), one.model) for name, one in cases.items()
    }
    for name, (start, at, then) in on.items():
        checkpoint = nano.base / "runs" / folder_of(start) / f"checkpoints/step={at}.ckpt"
        waiting[name] = then, (f"run.resume={checkpoint}",), start
    while waiting:
        ready = {name: (one, more) for name, (one, more, start) in waiting.items() if start in found}
        ranks = min(one.ranks for one, _ in ready.values())
        words = {
            name: (*common, *MODELS[one.model], *one.words, *more, f"trainer.devices={ranks}")
            for name, (one, more) in ready.items()
            if one.ranks == ranks
        }
        if ranks == 1:
            assert all(nano.run(folder_of(name), *overrides).code == 0 for name, overrides in words.items())
        else:
            runs_on_ranks(ranks, nano, {folder_of(name): overrides for name, overrides in words.items()}, timeout)
        found |= {name: Run(nano.base / "runs" / folder_of(name), 0) for name in words}
        waiting = {name: rest for name, rest in waiting.items() if name not in found}
    return found


def compare(nano: Nano, runs: dict[str, Run], name: str, model: str, steps: int) -> float:
    """The largest error of a gradient or weight, as a share of its norm. Raises AssertionError where curves or samples
    of text differ, or initial weights or expert biases in a bit."""
    assert_same_curves(runs[model], runs[name], 2e-5)
    assert samples(runs[model]) == samples(runs[name])
    worst = 0.0
    for file in ("start", *(f"step={step}" for step in range(1, steps + 1)), "end"):
        one, many = (torch.load(Path(nano.base, "recorded", folder_of(run), f"{file}.pt")) for run in (model, name))
        assert one.keys() == many.keys()
        for key, value in one.items():
            if file == "start" or key.endswith("expert_bias"):
                assert torch.equal(value, many[key]), (file, key)
            else:
                worst = max(worst, float((value - many[key]).norm() / value.norm()))
    return worst


def samples(run: Run) -> list[str]:
    return re.findall(r"```\n(.*?)\n```", (run.folder / "report.md").read_text(), re.S)
