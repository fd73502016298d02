"""Learning rate and step-wise schedules against the reports' numbers."""

import math
from types import SimpleNamespace

import pytest

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.training.config import Phase
from dsv3_lightning.training.schedule import check_schedule, lr_factor, progress, value_at

STEPS = 14_800  # a step is 1e9 tokens
V3 = [  # arXiv 2412.19437 §4.2, in shares of 14.8T tokens
    Phase(until=10 / 14.8, shape="constant", to=1.0),
    Phase(until=14.3 / 14.8, shape="cosine", to=0.1),
    Phase(until=14.633 / 14.8, shape="constant", to=0.1),
    Phase(until=1.0, shape="constant", to=7.3e-6 / 2.2e-4),
]


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0.0, 2.2e-4 * 1 / 20),  # the first of 20 warm-up steps already moves
        (0.009, 2.2e-4 * 10 / 20),
        (5.0, 2.2e-4),
        (9.999, 2.2e-4),
        (12.15, (2.2e-4 + 2.2e-5) / 2),  # half of the cosine's 4.3T
        (11.075, 2.2e-5 + (2.2e-4 - 2.2e-5) * (0.5 + 0.5 * math.cos(math.pi / 4))),  # a quarter of it
        (14.5, 2.2e-5),
        (14.7, 7.3e-6),
    ],
)
def test_the_reports_schedule(tokens, rate):
    assert 2.2e-4 * lr_factor(round(tokens * 1000), STEPS, 20, V3) == pytest.approx(rate, rel=2e-3)


def test_warmup_stable_decay_and_the_stairs_of_deepseek_llm():
    wsd = [Phase(until=0.8, shape="constant", to=1.0), Phase(until=1.0, shape="linear", to=0.0)]
    assert [lr_factor(step, 100, 10, wsd) for step in (0, 4, 79, 80, 90, 99)] == pytest.approx(
        [0.1, 0.5, 1, 1, 0.5, 0.05]
    )
    stairs = [Phase(until=u, shape="constant", to=to) for u, to in ((0.8, 1.0), (0.9, 0.316), (1.0, 0.1))]
    assert [lr_factor(step, 100, 0, stairs) for step in (0, 79, 80, 89, 90, 99)] == [1.0, 1.0, 0.316, 0.316, 0.1, 0.1]


def test_past_the_end_the_last_value_stays():
    assert lr_factor(200, 100, 0, [Phase(until=1.0, shape="cosine", to=0.1)]) == pytest.approx(0.1)


def test_a_step_changes_at_its_share():
    steps = [[0.0, 0.3], [0.676, 0.1]]
    assert [value_at(steps, share) for share in (0.0, 0.675, 0.676, 1.0)] == [0.3, 0.3, 0.1, 0.1]


def test_linear_and_cosine_points_are_approached_from_the_point_before():
    ramp = [[0, 1.0], [100, 1.0], [200, 0.0, "linear"], [300, 2.0]]
    assert [value_at(ramp, step) for step in (0, 99, 100, 150, 200, 299, 300, 900)] == [1, 1, 1, 0.5, 0, 0, 2, 2]
    cosine = [[0, 1.0], [4, 3.0, "cosine"]]
    expected = [2 - math.cos(math.pi * step / 4) for step in range(5)]
    assert [value_at(cosine, step) for step in range(5)] == pytest.approx(expected)


def test_a_place_is_counted_in_shares_steps_or_tokens():
    trainer = SimpleNamespace(
        estimated_stepping_batches=40, datamodule=SimpleNamespace(tokens_before=lambda step: 1000 * step)
    )
    assert [progress(trainer, 10, by) for by in ("share", "steps", "tokens")] == [0.25, 10, 10_000]


@pytest.mark.parametrize(
    ("wrong", "by", "reported"),
    [
        ([], "share", "must be a list of points"),
        (5, "share", "must be a list of points"),
        ([[0.0]], "share", "must be a list of points"),
        ([[0.0, "much"]], "share", "must be a list of points"),
        ([[0.0, 1.0], [0.5, 0.0, "sinus"]], "share", "linear or cosine"),
        ([[0.1, 1.0]], "share", "share must rise from 0 to at most 1.0"),
        ([[0.0, 1.0], [0.0, 2.0]], "share", "share must rise from 0"),
        ([[0.0, 1.0], [1.5, 0.0]], "share", "at most 1.0"),
        ([[0, 1.0], [100, 0.0], [50, 1.0]], "steps", "steps must rise from 0$"),
        ([[0.0, -1.0]], "share", "values must be at least 0"),
        ([[0.0, 1.0, "linear"]], "share", "leave out its shape"),
        ([[0.0, 1.0]], "epochs", "must be share, steps or tokens"),
    ],
)
def test_a_wrong_schedule_is_named(wrong, by, reported):
    with pytest.raises(ConfigError, match=rf"^callbacks\.x\.(schedule|by)=.*{reported}"):
        check_schedule(wrong, by, "callbacks.x.schedule")
