"""Every shipped experiment trains: the last variant of each, which changes the most, two steps at nano's sizes."""

import math

import pytest

from dsv3_lightning.cli import main
from dsv3_lightning.studies.experiment import Experiment
from tests.conftest import QUIET, ROOT, Run

EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiments").glob("*.yaml"))
# Sizes alone: attention, router, losses and callbacks stay the variant's own.
SMALL = (
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.intermediate_size=48",
    "model.moe_intermediate_size=16",
    "data.sequence_length=32",
    "data.batch_size=4",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1",
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_trains(tmp_path, data_cache, name):
    experiment = Experiment(name, [f"run.dir={tmp_path}", *data_cache, *QUIET, *SMALL])
    seed, variant = experiment.plan.seeds[0], list(experiment.plan.variants)[-1]
    (task,) = [task for task in experiment.tasks() if task.name == f"{variant}-seed{seed}"]
    task.write_variant()
    run = Run(tmp_path / name / task.name, main(["run", *task.files, *task.overrides]))
    assert run.code == 0 and run.report()["steps"] == 2
    assert math.isfinite(run.report()["val_loss"]) and len(run.report()["mtp_loss"]) == task.config.model.mtp_depth
