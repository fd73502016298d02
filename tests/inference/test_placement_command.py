"""`dsv3 placement` on a run's own validation text and on given loads."""

import json

import numpy as np
import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.commands.placement import picture
from dsv3_lightning.inference.expert_placement import gpu_loads, overload, rebalance_experts
from tests.conftest import QUIET, Nano


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_cache):
    nano = Nano(tmp_path_factory.mktemp("placement"), [*data_cache, *QUIET, "callbacks.sample_text=null"])
    return nano.run("r", "trainer.max_steps=2", "callbacks.checkpoint.every_n_steps=2")


@pytest.mark.slow
def test_a_runs_experts_are_placed_by_its_validation_text(run, capsys):
    assert main(["placement", str(run.folder), "--gpus", "4", "--nodes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    plan = json.loads((run.folder / "placement/placement.json").read_text())
    assert (run.folder / "placement/placement.png").stat().st_size > 1000
    load = torch.tensor(plan["load"])
    assert load.shape == (3, 16) and (load.sum(1) > 4 * 1000).all() and plan["replicas"] == 20
    expected = rebalance_experts(load, 20, 4, 2, 4)
    assert plan["physical_to_logical"] == expected.physical_to_logical.tolist()
    after = overload(gpu_loads(load, expected, 4))
    shown = [float(line.split()[-1]) for line in lines[-5:-2]]
    assert shown == pytest.approx(after.tolist(), abs=1e-3)
    before = float(lines[-2].split()[1])
    assert before > float(lines[-2].split()[2]) >= 1


def test_the_picture_counts_the_gpus_of_both_panels_from_0():
    """3 GPUs: 0, 1, 2 before, and 0, 1, 2 after."""
    figure = picture(torch.tensor([[6.0, 3.0, 0.0]] * 2), torch.tensor([[3.0, 3.0, 3.0]] * 2))
    figure.canvas.draw()
    before, after = figure.axes[:2]
    for axes, shares in ((before, [2, 1, 0]), (after, [1, 1, 1])):
        assert axes.get_xlabel() == "GPU" and axes.images[0].get_array().tolist() == [shares] * 2
        ticks = [label.get_text() for label in axes.get_xticklabels() if -0.5 <= label.get_position()[0] <= 2.5]
        assert ticks == ["0", "1", "2"]
    assert "before" in before.get_title() and "after" in after.get_title()
    assert before.images[0].norm is after.images[0].norm  # one scale of colors


@pytest.mark.slow
def test_loads_can_be_given(run, tmp_path, capsys):
    np.save(tmp_path / "loads.npy", np.arange(48).reshape(3, 16))
    out = ["--loads", str(tmp_path / "loads.npy"), "--out", str(tmp_path / "out"), "--replicas", "32"]
    assert main(["placement", str(run.folder), "--gpus", "8", *out]) == 0
    assert json.loads((tmp_path / "out/placement.json").read_text())["load"][2][15] == 47
    capsys.readouterr()
    assert main(["placement", str(run.folder), "--gpus", "5", "--replicas", "16"]) == 2
    assert "gpus=5: does not divide replicas=16" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "save, message",
    [
        (lambda path: np.save(path, np.ones((7, 16))), "is [7, 16], must be [3, 16] (MoE layers, routed experts)"),
        (lambda path: np.save(path, np.ones((3, 32))), "is [3, 32], must be [3, 16] (MoE layers, routed experts)"),
        (lambda path: np.save(path, np.ones(16)), "is [16], must be [3, 16] (MoE layers, routed experts)"),
        (lambda path: np.save(path, np.full((3, 16), "one")), "must hold whole or real numbers, holds <U3"),
        (lambda path: np.save(path, np.full((3, 16), None)), "not a readable .npy file (Object arrays cannot"),
        (lambda path: path.touch(), "not a readable .npy file (EOF"),
        (lambda path: np.savez(path.open("wb"), np.ones((3, 16))), "not a readable .npy file (the magic string"),
        (lambda path: path.write_bytes(b"\x93NUMPY\1\0\x0a\0{'descr': ("), "not a readable .npy file ("),
        (lambda path: path.mkdir(), "not a readable .npy file ([Errno"),
    ],
    ids=["layers", "experts", "flat", "strings", "objects", "empty", "npz", "header", "folder"],
)
def test_loads_that_can_not_be_used_are_one_line(save, message, run, tmp_path, capsys):
    save(tmp_path / "loads.npy")
    words = ["--loads", str(tmp_path / "loads.npy"), "--out", str(tmp_path / "out")]
    assert main(["placement", str(run.folder), "--gpus", "8", *words]) == 2
    assert f"--loads {tmp_path / 'loads.npy'}: {message}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb", [["placement", "--gpus", "8"], ["needle", "--lengths", "64"]], ids=lambda verb: verb[0]
)
@pytest.mark.parametrize("place", ["", "/inside"])
def test_a_result_without_a_folder_is_refused_before_the_work(verb, place, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dsv3_lightning.runs.models.load_model", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").write_text("mine")
    out = f"{tmp_path / 'file'}{place}"
    assert main([verb[0], str(run.folder), *verb[1:], "--out", out]) == 2
    assert f"--out {out}: must be a folder that can be written to (" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
