"""The average of the weights is the recursion over the weights of every step, is saved, and disturbs nothing."""

import pytest
import torch

from tests.runs.compare import assert_same_weights

SHORT = ("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.limit_val_batches=2")
AVERAGE = "callbacks.weight_average={decay: 0.15}"
EVERY = ("callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep=9")


def saved_average(run, step):
    states = torch.load(run.folder / f"checkpoints/step={step}.ckpt", weights_only=True)["callbacks"]
    return states["WeightAverage"]


@pytest.fixture
def averaged(nano):
    return nano.run("averaged", *SHORT, *EVERY, AVERAGE)


def test_it_follows_the_recursion(averaged):
    first, decays = saved_average(averaged, 1), (2 / 11, 3 / 12, 4 / 13)  # (1 + n) / (10 + n) before 0.15 is smaller
    assert first["updates"] == 1 and all(value > 0.15 for value in decays)
    expected = {name: value.double() for name, value in first["average"].items()}
    for step in (2, 3, 4):
        weights = averaged.weights(step)
        for name in expected:
            expected[name] = 0.15 * expected[name] + 0.85 * weights[f"model.{name}"].double()
    last = saved_average(averaged, 4)
    assert last["updates"] == 4 and len(last["average"]) == len(expected)
    for name, value in last["average"].items():
        assert value.dtype == torch.float32 and value.device.type == "cpu"
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_the_run_is_the_same_beside_it(nano, averaged):
    plain = nano.run("plain", *SHORT, *EVERY)
    assert_same_weights(plain, averaged, 4, exact=True)
    one, other = plain.scalars(), averaged.scalars()
    for tag in ("val/loss", "balance/max_vio_global", "balance/margin", "balance/coactivation_max"):
        assert one[tag] == other[tag], tag
    assert other["val/loss_average"][0] == [2, 4]
    assert other["val/loss_average"][1] != other["val/loss"][1]


def test_an_average_of_the_last_step_alone_has_its_loss(nano):
    scalars = nano.run("last", *SHORT, "callbacks.weight_average={decay: 0.0}").scalars()
    assert scalars["val/loss_average"] == scalars["val/loss"]


def test_a_resumed_run_resumes_with_it(nano, averaged):
    (averaged.folder / "report.json").unlink()
    for step in (3, 4):
        (averaged.folder / f"checkpoints/step={step}.ckpt").unlink()
    expected = averaged.scalars()["val/loss_average"]
    for path in averaged.folder.glob("checkpoints/best-step=4*"):
        path.unlink()
    resumed = nano.run("averaged", *SHORT, *EVERY, AVERAGE)
    assert resumed.code == 0 and resumed.scalars()["val/loss_average"] == expected
    assert saved_average(resumed, 4)["updates"] == 4


def test_a_decay_that_is_none_is_refused(nano, capsys):
    assert nano.run("refused", "callbacks.weight_average={decay: 1.0}").code == 2
    assert "callbacks.weight_average.decay=1.0" in capsys.readouterr().err


def test_parts_of_a_sharded_model_average_like_the_whole(nano):
    average = "callbacks.weight_average={decay: 0.5}"
    expected = nano.run("one", *SHORT, average)
    ranks = nano.command("two", *SHORT, average, "strategy=fsdp2", "trainer.devices=2", "trainer.accelerator=cpu")
    assert ranks.code == 0, ranks.output
    curves = [run.scalars() for run in (expected, ranks)]
    assert curves[1]["val/loss_average"][1] == pytest.approx(curves[0]["val/loss_average"][1], rel=2e-5)
    assert curves[1]["val/loss_average"][1] != pytest.approx(curves[1]["val/loss"][1], rel=2e-5)
    saved = saved_average(ranks, 4)["average"]
    for name, value in saved_average(expected, 4)["average"].items():
        torch.testing.assert_close(saved[name], value, rtol=1e-3, atol=1e-4)
