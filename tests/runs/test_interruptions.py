"""A run that is killed, stopped or damaged ends as if nothing had happened."""

import gc
import os
import signal
import time

import pytest
import torch

from dsv3_lightning.parallel.checkpoints.names import best_files
from tests.runs.compare import assert_same_curves, assert_same_weights

EVERY = ("callbacks.checkpoint.every_n_steps=5", "trainer.val_check_interval=10", "trainer.limit_val_batches=2")


def wait_for(process, text):
    """Reads the process's output up to a line that holds the text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in:\n{''.join(lines)}")


@pytest.fixture
def whole(nano):
    return nano.command("whole", "trainer.max_steps=40", *EVERY)


def test_killed_three_times_it_ends_with_the_same_bits_and_no_doubled_curve(nano, whole):
    arguments = ("trainer.max_steps=40", *EVERY)
    # in mid-step; right at a validation and a checkpoint; and once more before the next checkpoint
    for moment, delay in (("step 7/", 0.02), ("step 20/", 0.0), ("step 22/", 0.01)):
        process = nano.start("killed", *arguments)
        wait_for(process, moment)
        time.sleep(delay)
        process.kill()
        process.wait()
    last = nano.command("killed", *arguments)
    assert last.code == 0, last.output
    assert "continuing after step 20" in last.output
    assert_same_weights(whole, last, 40, exact=True)
    for tag, (steps, values) in last.scalars().items():
        assert steps == sorted(set(steps)), f"{tag} has doubled steps: {steps}"
        if tag.startswith("loss/"):
            assert values == whole.scalars()[tag][1]
    assert_same_curves_without_validation(whole, last)


def assert_same_curves_without_validation(expected, actual):
    """A validation that was under way when its process died is not repeated."""
    for tag in ("loss/main", "loss/balance", "optimizer/lr", "balance/max_vio", "balance/bias_absmax", "mtp/weight"):
        assert actual.scalars()[tag] == expected.scalars()[tag], tag


def test_a_checkpoint_between_two_logs_holds_what_the_next_one_averages(nano):
    """Logs after steps 5 and 10, a checkpoint after step 3: without its part, the first would hold steps 4 and 5."""
    words = ("trainer.max_steps=10", "trainer.log_every_n_steps=5", "callbacks.checkpoint={every_n_steps: 3, keep: 9}")
    words += ("trainer.accumulate_grad_batches=2", "loss={balance: [sequence, batch], balance_factor: [0.01, 0.01]}")
    words += ("trainer.val_check_interval=10", "trainer.limit_val_batches=1", "callbacks.router_monitor.per_layer=true")
    whole = nano.run("whole", *words)
    rest = nano.run("rest", *words, f"run.resume={whole.folder / 'checkpoints/step=3.ckpt'}")
    assert rest.scalars()["loss/main"][0] == [5, 10]
    assert_same_curves(whole, rest, 0.0)
    assert rest.scalars()["balance/max_vio_micro"] == whole.scalars()["balance/max_vio_micro"]
    assert rest.report()["max_vio_batch"] == whole.report()["max_vio_batch"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_resumes_later(nano, whole, number):
    process = nano.start("stopped", "trainer.max_steps=40", *EVERY)
    wait_for(process, "step 12/")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name} after step" in output and "Traceback" not in output
    last = nano.command("stopped", "trainer.max_steps=40", *EVERY)
    assert last.code == 0, last.output
    assert_same_weights(whole, last, 40, exact=True)
    assert_same_curves(whole, last, 0.0)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(nano):
    whole = nano.command("whole", *EVERY)
    damages = {"cut": cut_in_half, "no position": without_position}
    for name, damage in damages.items():
        process = nano.start(name, *EVERY)
        wait_for(process, "step 16/")
        process.kill()
        process.wait()
        damage(nano.base / "runs" / name / "checkpoints/step=15.ckpt")
        last = nano.command(name, *EVERY)
        assert "step=15.ckpt: not a" in last.output and "continuing after step 10" in last.output, last.output
        assert_same_weights(whole, last, 20, exact=True)


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)


def without_position(path):
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["TextDataModule"]["next_sample"]
    torch.save(checkpoint, path)


def test_a_named_checkpoint_that_is_missing_or_unsafe_is_one_line(nano, capsys, tmp_path):
    assert nano.run("x", "run.resume=/nope.ckpt").code == 2
    assert capsys.readouterr().err == "dsv3: error: run.resume=/nope.ckpt: no such checkpoint\n"
    evil = tmp_path / "evil=1.ckpt"
    torch.save({"state_dict": os.system}, evil)
    assert nano.run("x", f"run.resume={evil}").code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dsv3: error: {evil}: not a readable checkpoint") and error.count("\n") == 1


def test_a_run_that_ends_lets_go_of_its_folder_at_once(nano, capsys):
    gc.disable()  # it would end the frames that hold the lock, sooner or later
    try:
        assert nano.run("again", "trainer.max_steps=1").code == nano.run("again", "trainer.max_steps=1").code == 0
    finally:
        gc.enable()
    assert "this run is finished" in capsys.readouterr().out


def test_a_finished_run_is_left_alone_and_another_one_of_its_name_refused(nano, capsys):
    run = nano.run("done", *EVERY)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert nano.run("done", *EVERY).code == 0
    assert "this run is finished" in capsys.readouterr().out
    assert nano.run("done", *EVERY, "run.seed=2").code == 2
    assert "run.seed: 1 there, 2 here" in capsys.readouterr().err
    assert nano.run("done", *EVERY, "run.resume=false").code == 2
    assert "run.resume=false, but the run exists" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_a_mistake_found_before_the_first_step_leaves_the_name_free(nano, capsys):
    mistakes = ("data.paths=[/no/such/place]", "trainer.gradient_clip_algorithm=middle", "data.tokenizer=/none.json")
    assert [nano.run("corrected", mistake).code for mistake in mistakes] == [2, 2, 2]
    assert capsys.readouterr().err.count("\n") == 3
    assert nano.run("corrected", "trainer.max_steps=1").code == 0


def test_a_file_in_the_folders_place_and_a_second_process_are_refused(nano, capsys):
    (nano.base / "runs").mkdir()
    (nano.base / "runs/taken").write_text("mine")
    assert nano.run("taken").code == 2
    assert "a file of that name exists" in capsys.readouterr().err
    process = nano.start("shared", "trainer.max_steps=2000")
    wait_for(process, "step 2/")
    assert nano.run("shared", "trainer.max_steps=2000").code == 2
    assert "another process is writing this run" in capsys.readouterr().err
    process.kill()
    process.wait()


def test_killed_between_the_last_step_and_the_report_it_only_writes_the_report(nano):
    run = nano.run("late", *EVERY)
    expected = run.report()
    (run.folder / "report.json").unlink()
    best = [path.name for _, path in best_files(run.folder / "checkpoints") if "best-step=20-" in path.name]
    for name in best:
        (run.folder / "checkpoints" / name).unlink()
    assert nano.run("late", *EVERY).code == 0
    assert run.report()["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
    assert run.report()["max_vio_global"] == expected["max_vio_global"]
    assert run.report()["steps"] == 20
    (name,) = best  # the last step is the best one here, and is so again
    assert (run.folder / "checkpoints" / name).read_bytes() == (run.folder / "checkpoints/step=20.ckpt").read_bytes()
