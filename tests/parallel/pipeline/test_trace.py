"""Traces of real pipelines have every pass of the schedule in its order, and the bubble that is logged."""

import pytest

from dsv3_lightning.cli import main
from dsv3_lightning.planning.pipeline.actions import Action, schedule_slots
from dsv3_lightning.planning.pipeline.measured import read_trace
from tests.conftest import Run
from tests.parallel.conftest import runs_on_ranks

SCHEDULES = ("zbv", "dualpipev", "1f1b")


@pytest.fixture(scope="module")
def traced(shared_nano) -> dict[str, Run]:
    """Runs of two ranks by schedule; the second, fourth and sixth step are traced, and the latest two kept."""
    common = (
        "model.num_hidden_layers=8", "data.batch_size=4", "trainer.max_steps=6", "trainer.val_check_interval=6",
        "trainer.limit_val_batches=1", "trainer.devices=2", "callbacks.sample_text=null",
        "callbacks.pipeline_trace={every_n_steps: 2, keep: 2}",
    )  # fmt: skip
    words = {
        f"traced-{name}": (
            *common,
            f"strategy={{kind: fsdp2, pipeline_parallel: 2, schedule: {name}, micro_batches: 4}}",
        )
        for name in SCHEDULES
    }
    runs_on_ranks(2, shared_nano, words)
    return {name: Run(shared_nano.base / "runs" / f"traced-{name}", 0) for name in SCHEDULES}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_trace_has_every_pass_of_the_schedule_in_its_order(traced: dict[str, Run], name: str):
    found = read_trace(traced[name].folder)
    assert list(found) == [4, 6]
    for timeline in found.values():
        for mine, expected in zip(timeline.ranks, schedule_slots(name, 2, 4), strict=True):
            assert [action for event in mine for action in event.slot] == [a for slot in expected for a in slot]
            assert all(before.end <= after.start for before, after in zip(mine, mine[1:]))
        for mine in timeline.ranks:  # nothing starts before what it needs has ended
            for slot, start, _ in mine:
                for chunk, m in ((a.chunk, a.micro_batch) for a in slot if a.kind == "F" and a.chunk):
                    ended = [e.end for each in timeline.ranks for e in each if Action("F", chunk - 1, m) in e.slot]
                    assert ended[0] <= start


def test_the_logged_bubble_is_that_of_the_trace_and_the_trace_can_be_drawn(traced: dict[str, Run], capsys):
    for run in traced.values():
        steps, values = run.scalars()["pipeline/bubble_share"]
        assert steps == [2, 4, 6]
        shares = [timeline.bubble_share for timeline in read_trace(run.folder).values()]
        assert values[1:] == pytest.approx(shares, abs=1e-4)
        assert main(["trace", str(run.folder)]) == 0
        assert "bubble share of all ranks" in capsys.readouterr().out
