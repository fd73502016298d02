"""When checkpoints are written, under which names, and what a stop within a long step leaves."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from dsv3_lightning.callbacks.checkpoint import Checkpoint
from dsv3_lightning.cli import main
from dsv3_lightning.common.files import give_name
from dsv3_lightning.errors import ConfigError, RunStopped
from dsv3_lightning.parallel.checkpoints.names import best_files, step_files
from dsv3_lightning.training.logging import log_scalars
from tests.callbacks.test_in_other_projects import WIDTH, Regression, fit


class Hours:
    """A clock, in seconds, that advances by some minutes at each step of the training."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.now = minutes, 1000.0

    def __call__(self) -> float:
        return self.now


class Pass(pl.Callback):
    def __init__(self, clock: Hours) -> None:
        self.clock = clock

    def on_train_batch_end(self, *args) -> None:
        self.clock.now += 60 * self.clock.minutes


def steps_saved(folder: Path, minutes: float, **settings) -> list[int]:
    checkpoint = Checkpoint(keep=99, keep_best=0, **settings)
    checkpoint.clock = Hours(minutes)
    arguments = {"accumulate_grad_batches": 1, "max_steps": 7, "max_epochs": -1}
    fit(Regression(), folder, Pass(checkpoint.clock), checkpoint, **arguments)
    return sorted(int(path.name[5:-5]) for path in step_files(folder / "checkpoints"))


def test_a_checkpoint_is_due_when_the_minutes_since_the_last_one_began_are_over(tmp_path):
    assert steps_saved(tmp_path / "minutes", 8, every_n_steps=None, every_n_minutes=20) == [3, 6, 7]  # 7 is the last
    assert steps_saved(tmp_path / "both", 8, every_n_steps=2, every_n_minutes=20) == [2, 4, 6, 7]
    assert steps_saved(tmp_path / "mixed", 8, every_n_steps=4, every_n_minutes=20) == [3, 4, 7]


@pytest.mark.parametrize("first", [True, False])
def test_the_clock_of_the_first_rank_decides_for_all(first):
    """Of another rank, whose clock says that it is time, the all-reduce gets nothing; it takes what comes back."""
    sent = []
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda value, reduce_op: sent.append(value.tolist()) or value)
    checkpoint = Checkpoint(every_n_steps=None, every_n_minutes=1)
    checkpoint.clock = lambda: checkpoint.begun + 61
    trainer = SimpleNamespace(is_global_zero=first, should_stop=False, strategy=strategy)
    assert checkpoint.agreed(trainer) == (0, first) and sent == [[0, int(first)]]
    strategy.reduce = lambda value, reduce_op: torch.tensor([0, 1])
    assert checkpoint.agreed(trainer) == (0, True)


@pytest.mark.parametrize(
    "settings, message",
    [
        ("every_n_minutes: 0", "callbacks.checkpoint.every_n_minutes=0.0: must be above 0, or null for steps alone"),
        ("every_n_minutes: soon", "callbacks.checkpoint.every_n_minutes"),
        ("every_n_steps: null", "every_n_steps and every_n_minutes are both null; set one of them"),
        ("{every_n_steps: 0, every_n_minutes: 3}", "callbacks.checkpoint.every_n_steps=0: must be at least 1, or null"),
    ],
)
def test_intervals_that_mean_nothing_are_one_line(settings, message, capsys):
    assert main(["validate", "nano", f"callbacks.checkpoint={{{settings.strip('{}')}}}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    with pytest.raises(ConfigError):
        Checkpoint(every_n_steps=None)


def test_the_best_checkpoint_of_a_saved_step_is_a_second_name_of_it_and_outlives_it(tmp_path):
    fit(Regression(), tmp_path, Checkpoint(every_n_steps=1, keep=9), accumulate_grad_batches=1, max_epochs=1)
    folder = tmp_path / "checkpoints"
    ((_, best),) = best_files(folder)
    same = [path for path in step_files(folder) if path.samefile(best)]
    assert [path.name for path in same] == [f"step={best.name.split('=')[1].split('-')[0]}.ckpt"]
    content = best.read_bytes()
    same[0].unlink()
    assert best.read_bytes() == content


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("folder", [True, False])
def test_where_a_file_system_has_no_hard_links_the_second_name_is_a_copy(tmp_path, monkeypatch, links, folder):
    def refuse(*names):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path, name = tmp_path / "step=4.ckpt", tmp_path / "best-step=4-loss=1.0000.ckpt"
    if folder:
        (path / "shards").mkdir(parents=True)
    file = Path("shards/__0_0.distcp") if folder else Path()
    (path / file).write_bytes(b"numbers")
    give_name(path, name)
    assert (name / file).read_bytes() == b"numbers" and (name / file).samefile(path / file) is links
    assert sorted(item.name for item in tmp_path.iterdir()) == [name.name, path.name]


class Signal(pl.Callback):
    """Sends SIGTERM to this process after some micro-batch."""

    def __init__(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx + 1 == self.micro_batch:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "micro_batches, comes, stops, last",
    [
        (8, 9, 12, 1),  # in the second step
        (8, 2, 8, 1),  # in the first: there is nothing to save before its end
        (8, 13, 16, 2),
        (4, 5, 8, 2),  # short steps are finished
    ],
)
def test_in_a_long_step_a_signal_stops_between_micro_batches_with_the_step_before(
    tmp_path, micro_batches, comes, stops, last
):
    module = Regression()
    with pytest.raises(RunStopped, match=f"stopped by SIGTERM after step {last}, which is saved"):
        fit(
            module, tmp_path, Signal(comes), Checkpoint(every_n_steps=99, keep_best=0),
            data=DataLoader(TensorDataset(torch.randn(80, WIDTH))), accumulate_grad_batches=micro_batches,
        )  # fmt: skip
    assert len(module.seen) == stops
    (path,) = step_files(tmp_path / "checkpoints")
    assert path.name == f"step={last}.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == last


class Logs(pl.Callback):
    """Logs a value after each step."""

    def __init__(self, name, values):
        self.name, self.values = name, values

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        log_scalars(trainer, {self.name: self.values[trainer.global_step - 1]})


@pytest.mark.parametrize(
    ("kind", "values", "kept"),
    [
        ("highest", [-3.0, -1.5, float("nan"), -2.0, -1.0], {"best-step=5-highest=-1", "best-step=2-highest=-1.5"}),
        ("lowest", [1e-7, -2e30, 5e-8, 0.0, -3.0], {"best-step=2-lowest=-2e+30", "best-step=5-lowest=-3"}),
    ],
)
def test_the_best_by_any_logged_value_in_either_direction_are_kept(tmp_path, kind, values, kept):
    checkpoint = Checkpoint(every_n_steps=3, keep_best=2, best_by="eval/x/reward", best_is=kind)
    used = (Logs("eval/x/reward", values), checkpoint)
    fit(Regression(), tmp_path, *used, accumulate_grad_batches=1, max_epochs=1, logger=CSVLogger(tmp_path))
    names = {path.name.removesuffix(".ckpt") for path in (tmp_path / "checkpoints").glob("best-*")}
    assert names == kept
    assert [path.name.removesuffix(".ckpt") for _, path in best_files(tmp_path / "checkpoints")][0] == sorted(
        kept, key=lambda name: "step=5" not in name if kind == "highest" else "step=2" not in name
    )[0]
