"""Ranks that see a folder as it was some time ago, as on NFS or Lustre, do what the first rank says."""

import json

import pytest
import torch

from dsv3_lightning.config.compose import compose, to_yaml
from dsv3_lightning.config.schema import check, to_tree
from dsv3_lightning.errors import RunStopped
from dsv3_lightning.parallel.checkpoints.one_file import PARTS, AtomicCheckpointIO
from dsv3_lightning.parallel.meeting import refuse_mixed_steps
from tests.parallel.conftest import on_ranks


def make_run(folder, *steps, seed=1):
    """A run's folder with checkpoints of these steps, which hold no weights."""
    settings = [f"run.dir={folder.parent}", f"run.name={folder.name}", "trainer.max_steps=8", "trainer.devices=2"]
    tree = to_tree(check(compose(["nano"], [*settings, f"run.seed={seed}"]).tree))
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(tree))
    for step in steps:
        parts = dict.fromkeys(PARTS, 0) | {"global_step": step, "TextDataModule": {"next_sample": 3}}
        parts |= {"settings": tree | {"trainer": tree["trainer"] | {"precision": "32"}}, "w": torch.zeros(4)}
        AtomicCheckpointIO().save_checkpoint(parts, folder / f"checkpoints/step={step}.ckpt")
    return folder


@pytest.mark.parametrize("stale", [1, 0])
def test_all_ranks_start_from_what_the_first_one_sees(tmp_path, stale):
    """Whether a rank sees too little, or the first one does: never two steps. What is refused is refused on all."""
    runs = tmp_path / "runs"
    make_run(runs / "going", 2, 4, 6)
    make_run(runs / "new")
    make_run(runs / "other", 2, seed=2)
    (make_run(runs / "done", 8) / "report.json").write_text(json.dumps({"steps": 8}))
    damaged = make_run(runs / "damaged", 2, 4) / "checkpoints/step=4.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (tmp_path / "listing.json").write_text(json.dumps(["step=2.ckpt", "step=4.ckpt"]))
    first, second = on_ranks(
        2, tmp_path / "logs", ["tests.parallel.opening", str(stale), str(tmp_path / "listing.json"), str(runs)]
    )
    found = [dict(line.split(" ", 1) for line in output.splitlines() if line.split()[0] in names(runs))
             for output in (first, second)]  # fmt: skip
    assert found[0] == found[1]
    assert found[0]["going"] == ("False 6 32" if stale == 1 else "False 4 32")
    assert found[0]["new"] == "False None None" and found[0]["damaged"] == "False 2 32"
    assert found[0]["done"].startswith("True") and "run.seed: 2 there, 1 here" in found[0]["other"]
    assert "step=4.ckpt: not a readable checkpoint" in first and "not a readable" not in second
    assert "checksum of" in first and "checksum of" not in second  # a file may have 192 GB


def names(runs):
    return [path.name for path in runs.iterdir()]


@pytest.mark.parametrize(("ending", "line"), [("works", "heard prepared"), ("dies", "stopped rank 1 stops: the first")])
def test_ranks_wait_for_the_first_one_as_long_as_it_is_there(tmp_path, ending, line):
    """Preparing data may take hours; no time limit of a collective or of the store ends the others meanwhile."""
    logs = on_ranks(2, tmp_path, ["tests.parallel.waiting", ending], timeout=60)
    assert line in logs[1]


def test_ranks_that_loaded_different_steps_stop_with_one_line():
    refuse_mixed_steps([40] * 4)
    steps = [40] * 2048
    steps[7] = steps[1001] = 20
    with pytest.raises(RunStopped) as raised:
        refuse_mixed_steps(steps)
    line = "the ranks loaded different steps: 20 on ranks 7, 1001; 40 on ranks 0, 1, 2, 3, 4, 5, 6, 8 and 2038 more"
    assert str(raised.value) == line
