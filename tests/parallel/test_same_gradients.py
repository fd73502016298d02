"""Two and four processes give the losses, every gradient and the weights of one, over 20 steps.

With clipping, sequence-wise loss, MTP, bias updates, accumulation, and document ends that leave each micro-batch
another number of valid targets. Muon's runs are compared with one of Muon, and have whole matrices, parts of rows, and
parts of experts.
"""

import re

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.parallel.checkpoints.one_file import read_checkpoint
from dsv3_lightning.runs.models import load_hub_folder
from tests.parallel.conftest import runs_on_ranks
from tests.runs.compare import assert_same_curves

STEPS = 20
COMMON = (
    f"trainer.max_steps={STEPS}",
    "trainer.accumulate_grad_batches=2",
    "trainer.gradient_clip_val=0.3",  # below every norm of these runs
    "trainer.val_check_interval=10",
    "trainer.limit_val_batches=1",
    "data.sequence_length=24",
    "data.mask_document_ends=true",
    "loss.balance_factor=0.01",
    "model.num_hidden_layers=2",
    "model.vocab_size=512",
    "callbacks.checkpoint={every_n_steps: 5, keep: 4, keep_best: 0}",
    "optimizer.eps=1e-3",  # Adam then moves smoothly with the gradient, and rounding stays rounding
)
MUON = ("optimizer.kind=muon",)
WAYS = {
    2: {
        "fsdp2_of_2": ("strategy=fsdp2",),
        "ep2": ("strategy={kind: fsdp2_ep, sharded_checkpoints: true, overlap: two_batches}",),
        "muon_fsdp2": ("strategy=fsdp2", *MUON),
        "ep2_otherwise": ("strategy={kind: fsdp2_ep, dispatcher: benchmarks.scaling.AllGather}",),
    },
    4: {
        "fsdp2": ("strategy={kind: fsdp2, reshard_after_forward: false, sharded_checkpoints: true}",),
        "hsdp22": ("strategy={kind: hsdp, dp_shard: 2, prefetch: 2}", "compute.activation_checkpointing=full"),
        "ep2_fsdp2": (
            "strategy={kind: fsdp2_ep, expert_parallel: 2, sharded_checkpoints: true}",
            "compute.activation_checkpointing=selective",
        ),
        "muon_ep2_fsdp2": ("strategy={kind: fsdp2_ep, expert_parallel: 2, sharded_checkpoints: true}", *MUON),
        "ep4": ("strategy={kind: fsdp2_ep, expert_parallel: 4}", "compute.activation_checkpointing=full"),
    },
}
pytestmark = pytest.mark.timeout(900)  # many runs, made before the first test
NAMES = [name for ways in WAYS.values() for name in ways]

RESUMED = {  # on so many ranks, with that strategy, from that run's checkpoint of that step
    "1 -> 2 fsdp": (2, "{kind: fsdp2, sharded_checkpoints: true}", "one", 10),
    "2 fsdp -> 2 ep": (2, "fsdp2_ep", "fsdp2_of_2", 10),
    "1 -> 2 fsdp -> 4 ep": (4, "{kind: fsdp2_ep, expert_parallel: 4, deduplicate: false}", "1 -> 2 fsdp", 15),
    "2 ep -> 4 hsdp": (4, "{kind: hsdp, dp_shard: 2}", "ep2", 10),
    "4 ep x fsdp -> 4 fsdp": (4, "fsdp2", "ep2_fsdp2", 10),
    "4 fsdp -> 4 ep x fsdp": (4, "{kind: fsdp2_ep, expert_parallel: 2, sharded_checkpoints: true}", "fsdp2", 10),
    "4 fsdp -> 2 ep": (2, "{kind: fsdp2_ep, sharded_checkpoints: true}", "fsdp2", 10),
    "2 ep -> 1": (1, "auto", "ep2", 10),
    "4 hsdp -> 1": (1, "auto", "hsdp22", 10),
    "4 ep x fsdp -> 1": (1, "auto", "ep2_fsdp2", 10),
    "4 fsdp -> 2 ep -> 1": (1, "auto", "4 fsdp -> 2 ep", 15),
    "2 muon fsdp -> 2 ep": (2, "fsdp2_ep", "muon_fsdp2", 10),
    "4 muon ep x fsdp -> 1": (1, "auto", "muon_ep2_fsdp2", 10),
}


def folder_name(name):
    return name.replace(" -> ", "-to-").replace(" ", "-")


def of_one_process(name):
    """The run that this one must be equal to."""
    return "one_muon" if "muon" in name else "one"


def recorded(base, name):
    return ("callbacks.recorder={class_path: tests.parallel.recorder.Recorder, init_args: {folder: "
            f"{base / 'recorded' / name}}}}}",)  # fmt: skip


@pytest.fixture(scope="module")
def runs(shared_nano):
    base = shared_nano.base
    found = {"one": shared_nano.run("one", *COMMON, *recorded(base, "one"))}
    found["one_muon"] = shared_nano.run("one_muon", *COMMON, *MUON, *recorded(base, "one_muon"))
    assert found["one"].code == found["one_muon"].code == 0
    waves = [(2, WAYS[2]), (4, WAYS[4]), (2, {}), (1, {})]  # a wave's processes do one run after the other
    for ranks, ways in waves:
        nodes = 2 if ranks == 4 else 1  # so that norms and routers are sharded over fewer ranks than all else
        machines = f"trainer.devices={ranks // nodes}", f"trainer.num_nodes={nodes}"
        overrides = {name: (*COMMON, *way, *machines, *recorded(base, name)) for name, way in ways.items()}
        for name, (on, strategy, start, step) in RESUMED.items():
            if on == ranks and name not in found and start in found | overrides:
                checkpoint = base / "runs" / folder_name(start) / f"checkpoints/step={step}.ckpt"
                kind = MUON if "muon" in name else ()
                overrides[name] = (*COMMON, *kind, f"strategy={strategy}", *machines,
                                   "callbacks.sample_text=null", f"run.resume={checkpoint}")  # fmt: skip
        named = {folder_name(name): words for name, words in overrides.items()}
        runs_on_ranks(ranks, shared_nano, named, per_node=ranks // nodes)
        found |= {name: type(found["one"])(base / "runs" / folder_name(name), 0) for name in overrides}
    assert found.keys() == {"one", "one_muon", *NAMES, *RESUMED}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_and_weights_are_those_of_one_process(runs, shared_nano, name):
    assert_same_curves(runs[of_one_process(name)], runs[name], 2e-5)
    folder = shared_nano.base / "recorded"
    for file in ("start", *(f"step={step}" for step in range(1, STEPS + 1)), "end"):
        one, many = (torch.load(folder / run / f"{file}.pt") for run in (of_one_process(name), name))
        assert one.keys() == many.keys()
        for key, value in one.items():
            if file == "start" or key.endswith("expert_bias"):
                assert torch.equal(value, many[key]), (file, key)
            else:
                error = (value - many[key]).norm() / value.norm()
                assert error < 5e-5, f"{file} {key}: differs by {error:.1e} of its norm"


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumes_in_any_other_mesh(runs, name):
    """A file or a folder of shards: weights, optimizer state, expert bias, schedules and the data's position."""
    assert_same_curves(runs[of_one_process(name)], runs[name], 1e-5, after=RESUMED[name][3])


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_one_process(runs, name):
    """Writing text calls the model outside of its losses: sharded weights have to be gathered there too."""
    pair = of_one_process(name), name
    one, many = (re.findall(r"```\n(.*?)\n```", (runs[run].folder / "report.md").read_text(), re.S) for run in pair)
    assert len(one) == 3 and one == many


@pytest.mark.parametrize("name", ["ep2", "fsdp2", "ep2_fsdp2"])
def test_shards_are_exported_tensor_by_tensor(runs, name, tmp_path, monkeypatch):
    """By a process that belongs to no group, and nobody reads a whole checkpoint for it."""
    shards = runs[name].folder / "checkpoints/step=20.ckpt"
    expected = read_checkpoint(shards)["state_dict"]
    monkeypatch.setattr("dsv3_lightning.parallel.checkpoints.loading.fill", None)
    assert main(["export", str(shards), str(tmp_path / "out"), "--verify"]) == 0
    got = load_hub_folder(tmp_path / "out").state_dict()
    assert {f"model.{key}" for key in got} == {key for key in expected if key.startswith("model.")}
    assert all(torch.equal(value, expected[f"model.{key}"]) for key, value in got.items())
    next(shards.glob("shards/*.distcp")).unlink()
    assert main(["export", str(shards), str(tmp_path / "again")]) == 2
