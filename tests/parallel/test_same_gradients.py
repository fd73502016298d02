"""Two and four processes give the losses, every gradient and the weights of one, over 20 steps.

With clipping, sequence-wise loss, MTP, bias updates, accumulation, and document ends that leave each micro-batch
another number of valid targets.
"""

import re

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.commands.models import load_hub_folder
from dsv3_lightning.training.checkpoint_io import read_checkpoint
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
    "callbacks.checkpoint.every_n_steps=10",
    "optimizer.eps=1e-3",  # Adam then moves smoothly with the gradient, and rounding stays rounding
)
WAYS = {
    2: {"ep2": ("strategy={kind: fsdp2_ep, sharded_checkpoints: true}",)},
    4: {
        "fsdp2": ("strategy={kind: fsdp2, reshard_after_forward: false, sharded_checkpoints: true}",),
        "hsdp22": ("strategy={kind: hsdp, dp_shard: 2, prefetch: 2}", "compute.activation_checkpointing=full"),
        "ep2_fsdp2": (
            "strategy={kind: fsdp2_ep, expert_parallel: 2, sharded_checkpoints: true}",
            "compute.activation_checkpointing=selective",
        ),
        "ep4": ("strategy={kind: fsdp2_ep}", "compute.activation_checkpointing=full"),
    },
}

GO_ON = {  # on so many ranks, with that strategy, from the run's checkpoint at half time
    "4_ep_from_1": (4, "fsdp2_ep", "one"),
    "4_hsdp_from_2_ep": (4, "{kind: hsdp, dp_shard: 2}", "ep2"),
    "4_fsdp_from_4_ep": (4, "fsdp2", "ep2_fsdp2"),
    "4_ep_from_4_fsdp": (4, "{kind: fsdp2_ep, expert_parallel: 2, sharded_checkpoints: true}", "fsdp2"),
}


def recorded(base, name):
    return ("callbacks.recorder={class_path: tests.parallel.recorder.Recorder, init_args: {folder: "
            f"{base / 'recorded' / name}}}}}",)  # fmt: skip


@pytest.fixture(scope="module")
def runs(shared_nano):
    base = shared_nano.base
    found = {"one": shared_nano.run("one", *COMMON, *recorded(base, "one"))}
    assert found["one"].code == 0
    for ranks, ways in WAYS.items():
        overrides = {
            name: (*COMMON, *way, f"trainer.devices={ranks}", *recorded(base, name)) for name, way in ways.items()
        }
        overrides |= {
            name: (*COMMON, f"strategy={strategy}", f"trainer.devices={ranks}",
                   "callbacks.sample_text=null", f"run.resume={base / 'runs' / start / 'checkpoints/step=10.ckpt'}")
            for name, (on, strategy, start) in GO_ON.items() if on == ranks
        }  # fmt: skip
        runs_on_ranks(ranks, shared_nano, overrides)
        found |= {name: type(found["one"])(base / "runs" / name, 0) for name in overrides}
    return found


@pytest.mark.parametrize("name", [name for ways in WAYS.values() for name in ways])
def test_losses_gradients_and_weights_are_those_of_one_process(runs, shared_nano, name):
    assert_same_curves(runs["one"], runs[name], 2e-5)
    folder = shared_nano.base / "recorded"
    for file in ("start", *(f"step={step}" for step in range(1, STEPS + 1)), "end"):
        one, many = (torch.load(folder / run / f"{file}.pt") for run in ("one", name))
        assert one.keys() == many.keys()
        for key, value in one.items():
            if file == "start" or key.endswith("expert_bias"):
                assert torch.equal(value, many[key]), (file, key)
            else:
                error = (value - many[key]).norm() / value.norm()
                assert error < 5e-5, f"{file} {key}: differs by {error:.1e} of its norm"


@pytest.mark.parametrize("name", ["ep2", "fsdp2", "hsdp22", "ep2_fsdp2"])
def test_a_checkpoint_of_many_processes_goes_on_in_one(runs, shared_nano, name):
    """Files and folders of shards."""
    resumed = shared_nano.run(
        f"1_from_{name}",
        *COMMON,
        "callbacks.sample_text=null",
        f"run.resume={runs[name].folder}/checkpoints/step=10.ckpt",
    )
    assert resumed.code == 0
    assert_same_curves(runs["one"], resumed, 2e-5, after=10)


@pytest.mark.parametrize("name", GO_ON)
def test_a_checkpoint_goes_on_in_another_mesh(runs, name):
    assert_same_curves(runs["one"], runs[name], 2e-5, after=10)


@pytest.mark.parametrize("name", [name for ways in WAYS.values() for name in ways])
def test_samples_are_those_of_one_process(runs, name):
    """Writing text calls the model outside of its losses: sharded weights have to be gathered there too."""
    one, many = (
        re.findall(r"```\n(.*?)\n```", (runs[run].folder / "report.md").read_text(), re.S) for run in ("one", name)
    )
    assert len(one) == 3 and one == many


@pytest.mark.parametrize("name", ["ep2", "fsdp2", "ep2_fsdp2"])
def test_shards_are_exported_tensor_by_tensor(runs, name, tmp_path, monkeypatch):
    """By a process that belongs to no group, and nobody reads a whole checkpoint for it."""
    shards = runs[name].folder / "checkpoints/step=20.ckpt"
    expected = read_checkpoint(shards)["state_dict"]
    monkeypatch.setattr("dsv3_lightning.parallel.sharded.read_into", None)
    assert main(["export", str(shards), str(tmp_path / "out"), "--verify"]) == 0
    got = load_hub_folder(tmp_path / "out").state_dict()
    assert {f"model.{key}" for key in got} == {key for key in expected if key.startswith("model.")}
    assert all(torch.equal(value, expected[f"model.{key}"]) for key, value in got.items())
    next(shards.glob("shards/*.distcp")).unlink()
    assert main(["export", str(shards), str(tmp_path / "again")]) == 2
