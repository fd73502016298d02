"""Every stop saves its step and says why, the next session resumes from there, and what was due is made up for."""

import os
import signal
from types import SimpleNamespace

import pytest

from dsv3_lightning.callbacks.checkpoint import Checkpoint
from dsv3_lightning.callbacks.dashboard import RunLogger
from dsv3_lightning.parallel.checkpoints.names import best_files, best_name, resumable_files
from tests.runs.compare import assert_same_curves, assert_same_weights
from tests.runs.test_steps import diary

SHORT = ("trainer.max_steps=10", "trainer.val_check_interval=5", "trainer.limit_val_batches=1",
         "callbacks.router_monitor.every_n_steps=5")  # fmt: skip
SELDOM = "callbacks.checkpoint.every_n_steps=100"
DIARY = "callbacks.diary={class_path: tests.runs.poison.Diary}"


def poison(name: str, **arguments) -> str:
    return f"callbacks.poison={{class_path: tests.runs.poison.{name}, init_args: {arguments}}}"


@pytest.fixture(scope="module")
def whole(shared):
    return shared.run("whole", *SHORT)


def test_a_time_limit_stops_each_life_after_as_many_steps_and_all_lives_equal_one(shared, whole, capsys):
    """seen elsewhere: nothing is saved, or no later session makes a step (Lightning-AI/pytorch-lightning#10226)."""
    words = (*SHORT, SELDOM, poison("Ticks", duration={"seconds": 4}))
    for step in (4, 8):
        run = shared.run("limited", *words)
        assert run.code == 0
        line = (
            f"stopped by the time limit of 0:00:04 for one start (trainer.max_time or Timer) after step {step}, which"
        )
        assert f"{line} is saved; the same command resumes from there" in capsys.readouterr().out
        assert (run.folder / f"checkpoints/step={step}.ckpt").exists()
    assert shared.run("limited", *words).code == 0
    assert_same_curves(whole, run, 0.0)
    assert_same_weights(whole, run, 10, exact=True)


def test_the_step_in_which_a_callback_asks_to_stop_is_finished_and_saved(shared, capsys):
    words = (*SHORT, SELDOM, "trainer.accumulate_grad_batches=4", poison("Stop", steps=[3]))
    whole, run = shared.run("asked_whole", *words[:-1]), shared.run("asked", *words)
    assert "stopped by a callback that set trainer.should_stop after step 3, which is saved" in capsys.readouterr().out
    assert shared.run("asked", *words).code == 0
    assert_same_curves(whole, run, 0.0)


def test_a_run_that_a_validation_stops_saves_that_step_and_its_next_life_works(shared, capsys):
    """Each session of three makes the steps to its next validation, as with an EarlyStopping whose patience is out."""
    words = (*SHORT[2:], "trainer.max_steps=6", "trainer.val_check_interval=2", SELDOM, poison("StopAfterValidation"))
    for step in (2, 4, 6):
        run = shared.run("validated", *words)
        stopped = f"stopped by a callback that set trainer.should_stop after step {step}, which is saved"
        assert (stopped in capsys.readouterr().out) == (step < 6)
        assert resumable_files(run.folder / "checkpoints")[0].name == f"step={step}.ckpt"
    assert_same_curves(shared.run("validated_whole", *words[:-1]), run, 0.0)


@pytest.mark.parametrize(
    "moment",
    [
        [3, "on_train_batch_end"],
        [4, "on_after_backward"],  # in step 5
        [5, "on_validation_batch_end"],
        [8, "log_metrics"],  # of a logger, in step 9
    ],
)
def test_an_exception_leaves_the_last_step_saved_that_was_done(shared, moment, capsys, monkeypatch):
    """With means over several steps, of which a part is in the checkpoint, and none of the step that failed."""
    words = (*SHORT, SELDOM, "trainer.log_every_n_steps=3", "trainer.accumulate_grad_batches=2")
    whole = shared.run("logged", *words)  # the second time it is finished
    failing = [] if moment[1] == "log_metrics" else [poison("Raise", moments=[moment], kill=False)]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="on purpose"):
        if not failing:
            patch.setattr(RunLogger, "log_metrics", fail_after(moment[0]))
        shared.run(f"raising{moment[0]}", *words, *failing)
    assert f"stopped by RuntimeError after step {moment[0]}, which is saved" in capsys.readouterr().out
    run = shared.run(f"raising{moment[0]}", *words, *failing)
    if failing:
        assert_same_curves(whole, run, 0.0)
    assert_same_weights(whole, run, 10, exact=True)


def fail_after(last: int):
    def log_metrics(self, metrics, step):
        if step > last:
            raise RuntimeError("raised on purpose")

    return log_metrics


def test_a_lost_terminal_stops_a_run_as_sigterm_does(shared, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(Checkpoint, "on_train_batch_start", lambda *a: os.kill(os.getpid(), signal.SIGHUP))
    assert shared.run("hung_up", *SHORT).code == 128 + signal.SIGHUP
    assert "stopped by SIGHUP after step 1, which is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGHUP) == before


KILLS = [
    [3, "on_train_batch_start"],  # there is no checkpoint yet
    [5, "on_save_checkpoint"],
    [5, "on_validation_start"],
    [5, "on_validation_batch_end"],
    [5, "on_validation_end"],
    [6, "on_train_batch_end"],
    [10, "on_validation_start"],
]


def test_curves_are_the_same_wherever_kills_fall(shared, whole, capsys):
    """Also of what is logged again: it is on the disk already when a session ends by such a kill."""
    words = (*SHORT, "callbacks.checkpoint.every_n_steps=5", poison("Raise", moments=KILLS))
    for _ in KILLS:
        with pytest.raises(SystemExit):
            shared.run("killed", *words)
    killed = shared.run("killed", *words)
    assert killed.code == 0
    assert_same_curves(whole, killed, 0.0)
    assert_same_weights(whole, killed, 10, exact=True)
    assert "validation after step 0" not in capsys.readouterr().out
    assert killed.report()["train_loss"] == whole.report()["train_loss"]


def test_micro_batches_may_change_at_every_resume(shared):
    """Samples, steps, validations and the saved position are those of a run that was never interrupted."""
    common = ("data.batch_size=12", "trainer.limit_val_batches=0.3", DIARY, SELDOM, *SHORT[:2])
    whole = shared.run("changed_whole", *common)
    words = (*common, poison("Stop", steps=[2, 3, 5, 7]))
    for micro_batches in (4, 3, 4, 6, 2):
        run = shared.run("changed", *words, f"trainer.accumulate_grad_batches={micro_batches}")
        assert run.code == 0
    steps = [[entry for entry in diary(run) if "samples" in entry] for run in (whole, run)]
    assert [(entry["step"], entry["samples"], entry["lr"]) for entry in steps[0]] == [
        (entry["step"], entry["samples"], entry["lr"]) for entry in steps[1]
    ]
    assert_same_curves(whole, run, 1e-4)


def test_a_run_that_has_only_best_checkpoints_keeps_as_many_and_resumes_from_the_newest(shared, capsys):
    words = (*SHORT[2:], "trainer.max_steps=8", "trainer.val_check_interval=1", SELDOM)
    killed = (*words, poison("Raise", moments=[[6, "on_train_batch_start"]]))
    with pytest.raises(SystemExit):
        shared.run("best", *killed)
    (newest,) = resumable_files(shared.base / "runs/best/checkpoints")  # each validation is better than the one before
    assert newest.name.startswith("best-step=6-")
    run = shared.run("best", *killed)
    assert f"continuing after step 6 from {newest}" in capsys.readouterr().out
    assert_same_curves(shared.run("each", *words), run, 0.0)


@pytest.mark.parametrize("loss", [-3.25, -1e-9, 0.0, 4.25, 1e30])
def test_every_finite_loss_is_read_back_from_a_name(tmp_path, loss):
    path = tmp_path / best_name(7, loss)
    path.touch()
    assert best_files(tmp_path) == [(pytest.approx(loss, abs=1e-4), path)]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf"), None])
def test_a_loss_that_is_not_finite_or_absent_is_no_best_one(tmp_path, loss):
    module = SimpleNamespace(scalars={} if loss is None else {"val/loss": loss}, steps_done=4)
    trainer = SimpleNamespace(
        lightning_module=module, default_root_dir=tmp_path, is_global_zero=True, callback_metrics={}
    )
    Checkpoint(every_n_steps=2, keep=1, keep_best=1).save_if_best(trainer)  # which would need a whole Trainer to save
    assert not list(tmp_path.iterdir())
