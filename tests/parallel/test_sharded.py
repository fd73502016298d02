"""Folders of shards, looked at and judged in one process without holding them."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dsv3_lightning.cli import main
from dsv3_lightning.parallel.checkpoints.metadata import read_index
from dsv3_lightning.parallel.checkpoints.names import REST, SHARDS
from dsv3_lightning.parallel.checkpoints.shards import split
from tests.conftest import ROOT

WEIGHTS = 3  # with two moments each: 9 tensors


def state(numbers: int) -> dict:
    """What a run saves, of so many numbers in each tensor."""
    weights = {f"model.{index}.weight": torch.ones(numbers) for index in range(WEIGHTS)}
    moments = {
        index: {"step": torch.tensor(7.0), "exp_avg": torch.ones(numbers), "exp_avg_sq": torch.ones(numbers)}
        for index in range(WEIGHTS)
    }
    return {
        "state_dict": weights | {"model.0.expert_bias": torch.zeros(4)},
        "optimizer_states": [{"state": moments, "param_groups": [{"params": list(range(WEIGHTS))}]}],
        "callbacks": {"Average": {"decay": {"of": torch.tensor(0.5)}}},
        "lr_schedulers": [], "loops": {}, "global_step": 7, "skipped_steps": 0, "validated": True, "settings": {},
        "TextDataModule": {"next_sample": 3},
    }  # fmt: skip


def write(path: Path, content: dict) -> Path:
    tensors, rest = split(content)
    path.mkdir()
    torch.save(rest, path / REST)
    dcp.save(tensors, checkpoint_id=path / SHARDS, no_dist=True)
    return path


MEASURE = """
import sys
from pathlib import Path
from dsv3_lightning.cli import main

def peak():  # getrusage's is at least that of the process that started this one
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024

main(["checkpoint", sys.argv[1], sys.argv[2]])  # of a small one: what the code itself takes
before = peak()
assert main(["checkpoint", sys.argv[1], sys.argv[3]]) == 0
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("action, tensors", [("inspect", 0.5), ("verify", 3.0)])
def test_memory_is_that_of_a_tensor_not_of_the_checkpoint(action, tensors, tmp_path):
    """verify: of one tensor the file's bytes and the tensor."""
    size = 2**25
    small, large = write(tmp_path / "small.ckpt", state(8)), write(tmp_path / "large.ckpt", state(size // 4))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, action, str(small), str(large)], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert int(done.stdout.split()[-1]) < tensors * size


def test_shards_and_one_file_of_the_same_show_and_are_judged_alike(tmp_path, capsys):
    file = tmp_path / "one.ckpt"
    torch.save(state(8), file)
    shown = []
    for path in (write(tmp_path / "many.ckpt", state(8)), file):
        assert main(["checkpoint", "inspect", str(path)]) == main(["checkpoint", "verify", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        shown.append([line.split() for line in lines[2:] if "files" not in line and "sound" not in line])
        assert "sound, 14 tensors read, all finite; step 7" in lines[-1]  # 4 of the model, 3 of each weight, an average
    assert shown[0] == shown[1] and any("moments" in line and "51" in line for line in shown[0]), shown


def test_what_is_wrong_in_shards_is_named(tmp_path, capsys):
    """A number in the last tensor of the last file, one next to the shards, a bias that lost its type, a cut record."""
    nan, scalar, bias, damaged = (state(8) for _ in range(4))
    nan["optimizer_states"][0]["state"][2]["exp_avg_sq"][-1] = float("inf")
    scalar["callbacks"]["Average"]["decay"]["of"].fill_(float("nan"))
    bias["state_dict"]["model.0.expert_bias"] = bias["state_dict"]["model.0.expert_bias"].bfloat16()
    del damaged["optimizer_states"][0]["state"][1]["exp_avg"]
    for name, content, message in (
        ("nan", nan, "optimizer/0/2/exp_avg_sq holds numbers that are not finite"),
        ("scalar", scalar, "callback/Average/decay/of holds numbers that are not finite"),
        ("bias", bias, "model.0.expert_bias is torch.bfloat16, must be fp32"),
        ("moments", damaged, "parameter 1 of the optimizer has no moments"),
    ):
        assert main(["checkpoint", "verify", str(write(tmp_path / name, content))]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    path = write(tmp_path / "record", state(8))
    stored = dcp.FileSystemReader(path / SHARDS).read_metadata().storage_data
    place = next(place for index, place in stored.items() if index.fqn.endswith("1.weight"))
    with open(path / SHARDS / place.relative_path, "r+b") as shard:
        shard.seek(place.offset)
        shard.write(bytes(place.length))
    assert main(["checkpoint", "verify", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"model.1.weight in shards/{place.relative_path} is damaged" in error
    assert error.count("\n") == 1


def test_each_file_is_looked_at_once_however_many_tensors_it_has(tmp_path, monkeypatch):
    path = write(tmp_path / "many.ckpt", state(8))
    looks, stat = Counter(), Path.stat
    monkeypatch.setattr(Path, "stat", lambda file, **how: looks.update([file.name]) or stat(file, **how))
    read_index(path)
    (shard,) = (path / SHARDS).glob("*.distcp")
    assert 0 < looks[shard.name] <= 2  # whether it is there, and its size
