"""`dsv3 placement` on a run's own validation text and on given loads."""

import json

import numpy as np
import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.inference.expert_placement import gpu_loads, overload, rebalance_experts
from tests.conftest import QUIET, Nano


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_cache):
    nano = Nano(tmp_path_factory.mktemp("placement"), [*data_cache, *QUIET, "callbacks.sample_text=null"])
    return nano.run("r", "trainer.max_steps=2", "callbacks.checkpoint.every_n_steps=2")


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


def test_loads_can_be_given(run, tmp_path, capsys):
    np.save(tmp_path / "loads.npy", np.arange(32).reshape(2, 16))
    out = ["--loads", str(tmp_path / "loads.npy"), "--out", str(tmp_path / "out"), "--replicas", "32"]
    assert main(["placement", str(run.folder), "--gpus", "8", *out]) == 0
    assert json.loads((tmp_path / "out/placement.json").read_text())["load"][1][15] == 31
    capsys.readouterr()
    np.save(tmp_path / "loads.npy", np.ones(16))
    assert main(["placement", str(run.folder), "--gpus", "8", *out]) == 2
    assert "is [16], must be [layers, 16 experts]" in capsys.readouterr().err
    assert main(["placement", str(run.folder), "--gpus", "5", "--replicas", "16"]) == 2
    assert "gpus=5: does not divide replicas=16" in capsys.readouterr().err
