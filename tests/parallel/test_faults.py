"""Ranks that are killed under torchrun: the others end too, all start again by themselves, and nothing is lost."""

import os
import shutil
from dataclasses import replace

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.parallel.checkpoints.one_file import read_checkpoint
from tests.conftest import Run
from tests.parallel.conftest import runs_on_ranks, under_torchrun
from tests.runs.compare import assert_same_curves

COMMON = (
    "trainer.max_steps=15",
    "trainer.val_check_interval=5",
    "trainer.limit_val_batches=1",
    "trainer.precision=bf16",
    "data.sequence_length=16",
    "model.num_hidden_layers=2",
    "callbacks.checkpoint={every_n_steps: 5, keep: 2, keep_best: 1}",
    "callbacks.sample_text=null",
    "callbacks.weight_average={decay: 0.5}",
    "strategy={kind: fsdp2_ep, sharded_checkpoints: true}",
    "trainer.devices=2",
)
KILLS = "[[8, step, 0], [10, save, 1], [15, validation, 1]]"


@pytest.fixture(scope="module")
def runs(shared_nano):
    """Under torchrun: one that is killed in a step, in a save and in a validation, and one that is left alone."""
    killer = ("callbacks.killer={class_path: tests.parallel.killer.Killer, init_args: {"
              f"folder: {shared_nano.base / 'killed'}, kills: {KILLS}}}}}",)  # fmt: skip
    found = {}
    for name, overrides in (("alone", COMMON), ("killed", (*COMMON, *killer))):
        found[name] = under_torchrun(shared_nano, name, overrides)
    return found


def test_killed_three_times_it_ends_with_the_weights_of_the_undisturbed_run(runs, shared_nano):
    alone, killed = runs["alone"], runs["killed"]
    assert (alone.code, killed.code) == (0, 0), killed.output[-6000:]
    assert len(list((shared_nano.base / "killed").iterdir())) == 3
    one, other = (read_checkpoint(run.folder / "checkpoints/step=15.ckpt") for run in (alone, killed))
    average = one["callbacks"]["WeightAverage"]["average"]
    assert {f"model.{name}" for name in average} == {name for name in one["state_dict"] if "expert_bias" not in name}
    assert_same(one["state_dict"], other["state_dict"])
    assert_same(average, other["callbacks"]["WeightAverage"]["average"])


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_it_went_on_each_time_from_the_newest_checkpoint_that_was_whole(runs):
    went_on = [line for line in runs["killed"].output.splitlines() if "continuing after step" in line]
    assert [line.split()[3] for line in went_on] == ["5", "5", "15"], went_on  # step 10's was never finished


def test_old_checkpoints_go_and_nothing_half_written_stays(runs):
    names = sorted(path.name.split("-loss")[0] for path in (runs["killed"].folder / "checkpoints").iterdir())
    assert names == ["best-step=15", "last.ckpt", "step=10.ckpt", "step=15.ckpt"]  # by a validation that was cut short
    assert (runs["killed"].folder / "checkpoints/last.ckpt").resolve().name == "step=15.ckpt"


def test_resuming_from_an_earlier_checkpoint_writes_the_later_ones_again(runs, shared_nano):
    """Folders of shards are there already under the names that are saved next; no rename replaces a folder."""
    copy = shared_nano.base / "elsewhere/alone"
    shutil.copytree(runs["alone"].folder, copy, symlinks=True)
    resume = f"run.resume={copy / 'checkpoints/step=10.ckpt'}"
    again = under_torchrun(shared_nano, "alone", (*COMMON, f"run.dir={copy.parent}", resume))
    assert again.code == 0 and "continuing after step 10" in again.output, again.output[-6000:]
    one, other = (read_checkpoint(folder / "checkpoints/step=15.ckpt") for folder in (runs["alone"].folder, copy))
    assert_same(one["state_dict"], other["state_dict"])
    assert not list((copy / "checkpoints").glob("*.old")) and not list((copy / "checkpoints").glob("*.new"))


def test_a_finished_run_is_left_alone_by_every_rank(runs, shared_nano):
    """If the first rank alone sees it, the others wait for it until the time is out."""
    repeated = under_torchrun(shared_nano, "alone", (*COMMON, "strategy={kind: fsdp2_ep, timeout_minutes: 0.5}"))
    assert repeated.code == 0 and repeated.output.count("this run is finished, nothing to do") == 1, repeated.output


def test_ranks_of_lightnings_own_ddp_start_again_too(shared_nano):
    folder = shared_nano.base / "killed_ddp"
    killer = ("callbacks.killer={class_path: tests.parallel.killer.Killer, init_args: {"
              f"folder: {folder}, kills: [[8, step, 1]]}}}}")  # fmt: skip
    run = under_torchrun(shared_nano, "ddp", (*COMMON, "strategy=ddp", killer))
    assert run.code == 0, run.output[-6000:]
    assert len(list(folder.iterdir())) == 1 and "continuing after step 5" in run.output
    assert run.report()["steps"] == 15


@pytest.fixture(scope="module")
def there_and_back(runs, shared_nano):
    """From the shards on one process, whose weights are bf16, and from its checkpoint on two again."""
    found, start = {}, runs["alone"].folder / "checkpoints/step=10.ckpt"
    for name, overrides in (("one", ("strategy=auto",)), ("two", COMMON[-2:])):
        recorder = ("callbacks.recorder={class_path: tests.parallel.recorder.Recorder, init_args: {gradients: false, "
                    f"folder: {shared_nano.base / name}}}}}")  # fmt: skip
        words = (
            *COMMON[:-2],
            *overrides,
            recorder,
            f"run.resume={start}",
            "callbacks.checkpoint={every_n_steps: 2, keep: 9, keep_best: 0}",
        )
        if name == "one":
            assert shared_nano.run(name, *words).code == 0
        else:
            runs_on_ranks(2, shared_nano, {name: words})
        found[name] = Run(shared_nano.base / "runs" / name, 0), read_checkpoint(start), shared_nano.base / name
        start = found[name][0].folder / "checkpoints/step=12.ckpt"
    return found


def test_bf16_runs_resume_with_one_process_and_with_two(runs, there_and_back):
    for name, step in (("one", 10), ("two", 12)):  # the sums of bf16 products are rounded at other places
        assert_same_curves(loss_alone(runs["alone"]), loss_alone(there_and_back[name][0]), 2e-3, after=step)


def test_fp32_weights_survive_the_way_there_and_back_to_the_bit(there_and_back):
    _, shards, folder = there_and_back["one"]
    names = in_order_of_the_optimizer(shards["state_dict"])
    for name, master in zip(names, torch.load(folder / "masters.pt").values(), strict=True):
        assert torch.equal(master, shards["state_dict"][name]), name
    _, file, folder = there_and_back["two"]
    assert any(value.dtype == torch.bfloat16 for value in file["state_dict"].values())
    weights = torch.load(folder / "start.pt")
    for name, master in zip(names, file["optimizer_states"][0]["masters"], strict=True):
        assert torch.equal(weights[name.removeprefix("model.")], master), name


def in_order_of_the_optimizer(state: dict[str, torch.Tensor]) -> list[str]:
    """Matrices before norms."""
    names = [name for name in state if name.startswith("model.") and not name.endswith("expert_bias")]
    return sorted(names, key=lambda name: state[name].dim() < 2)


def loss_alone(run: Run) -> Run:
    class Loss(Run):
        def scalars(self):
            return {tag: curve for tag, curve in super().scalars().items() if "loss" in tag and tag != "loss/balance"}

    return Loss(**vars(replace(run)))


def test_checkpoint_verbs_show_judge_and_join_shards(runs, tmp_path, capsys):
    shards, file = runs["alone"].folder / "checkpoints/step=10.ckpt", tmp_path / "one.ckpt"
    assert main(["checkpoint", "inspect", str(shards)]) == 0
    shown = capsys.readouterr().out
    assert "shards" in shown and "optimizer step" in shown and "none: the weights are fp32" in shown
    assert main(["checkpoint", "verify", str(shards)]) == 0
    assert "sound, " in capsys.readouterr().out
    assert main(["checkpoint", "consolidate", str(shards), str(file)]) == 0
    one, many = read_checkpoint(file), read_checkpoint(shards)
    assert all(torch.equal(value, one["state_dict"][name]) for name, value in many["state_dict"].items())
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(one["optimizer_states"][0]["state"][3][name], many["optimizer_states"][0]["state"][3][name])
    assert main(["checkpoint", "consolidate", str(shards), str(file)]) == 2
    assert "already exists" in capsys.readouterr().err
    texts = []
    for path in (shards, file):
        assert main(["generate", str(path), "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("def ")
    one["state_dict"]["model.norm.weight"][0] = float("nan")
    torch.save(one, file)
    assert main(["checkpoint", "verify", str(file)]) == 2
    assert "model.norm.weight holds numbers that are not finite" in capsys.readouterr().err
    assert main(["checkpoint", "consolidate", str(shards)]) == 2


def test_a_shard_that_was_cut_is_named(runs, capsys):
    shards = runs["killed"].folder / "checkpoints/step=10.ckpt"
    (cut, *_) = (shards / "shards").glob("*.distcp")
    os.truncate(cut, cut.stat().st_size // 2)
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(shards)]) == 2
    error = capsys.readouterr().err
    assert f"shards/{cut.name} is missing or cut" in error and error.count("\n") == 1
