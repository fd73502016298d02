"""Traces of pipelines: files, times of chunks, and the simulation that they feed."""

import random
from pathlib import Path

import pytest

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.planning.pipeline.actions import Action, Slot, schedule_slots
from dsv3_lightning.planning.pipeline.measured import (
    FOLDER,
    MeasuredTimes,
    measured_times,
    read_trace,
    simulated,
    trace_file,
    write_trace,
)
from dsv3_lightning.planning.pipeline.timeline import ChunkTimes, Event, Timeline, simulate

TRUE = ChunkTimes([0.01, 0.02, 0.02, 0.03], [0.02, 0.02, 0.03, 0.03], [0.01, 0.01, 0.02, 0.01], together=0.8)


def noisy(schedule: str, seed: int, share: float = 0.1) -> Timeline:
    """A run whose actions take up to `share` longer or shorter than TRUE."""
    numbers = random.Random(seed)

    def times(slot: Slot) -> float:
        return TRUE(slot) * numbers.uniform(1 - share, 1 + share)

    return simulate(schedule_slots(schedule, 2, 6), times, 4)


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev", "interleaved_zero_bubble"])
def test_a_simulation_with_measured_times_has_the_bubble_of_the_run(schedule: str):
    exact = noisy(schedule, 0, share=0.0)
    again = simulated(exact, measured_times([exact]))
    assert again.span == pytest.approx(exact.span) and again.idle == pytest.approx(exact.idle)
    measured = [noisy(schedule, seed) for seed in range(5)]
    share = simulated(measured[0], measured_times(measured)).bubble_share
    assert share == pytest.approx(exact.bubble_share, rel=0.15)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path):
    steps = {step: noisy("dualpipev", step) for step in (20, 10)}
    for rank in (0, 1):
        write_trace(tmp_path, rank, {step: timeline.ranks[rank] for step, timeline in steps.items()})
    found = read_trace(tmp_path)
    assert list(found) == [10, 20]
    for step, timeline in found.items():
        for mine, theirs in zip(timeline.ranks, steps[step].ranks, strict=True):
            assert [event.slot for event in mine] == [event.slot for event in theirs]
            assert [event.end for event in mine] == pytest.approx([event.end for event in theirs], abs=1e-6)
    write_trace(tmp_path, 1, {20: steps[20].ranks[1]})  # a rank that was stopped earlier
    assert list(read_trace(tmp_path)) == [20]


def test_times_that_were_not_measured_follow_from_others():
    times = MeasuredTimes(
        {(("F", 0),): 1.0, (("B", 0),): 4.0, (("I", 1),): 3.0, (("W", 1),): 2.0, (("F", 0), ("B", 1)): 5.0}
    )
    assert times((Action("I", 0, 7),)) == times((Action("W", 0, 7),)) == 2
    assert times((Action("B", 1, 7),)) == 5
    assert times((Action("F", 0, 1), Action("B", 1, 0))) == 5  # together, less than 1 + 5
    assert times((Action("F", 0, 1), Action("B", 0, 0))) == 5


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", r"line 1 is no traced step \("),
        ('{"step": 1, "slots": []}', "line 1 is no traced step \\(no slots"),
        ('{"step": 1, "slots": [["0F0", 0, 1]]}\n{"step": 2, "slots": [["0X0", 0, 1]]}', "line 2 .*'0X0' is no action"),
        ('{"step": 1, "slots": [["0F0", 1, 0.5]]}', "ends before it starts"),
        ('{"slots": [["0F0", 0, 1]]}', "line 1 is no traced step"),
        ("[1]", "line 1 is no traced step"),
    ],
)
def test_a_damaged_trace_is_named_with_its_line(tmp_path: Path, content: str, problem: str):
    (tmp_path / FOLDER).mkdir()
    trace_file(tmp_path, 0).write_text(content)
    with pytest.raises(ConfigError, match=rf"^.*rank-00000\.jsonl: .*{problem}"):
        read_trace(tmp_path)


def test_a_run_without_a_trace_or_with_part_of_one_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no trace of a pipeline; run it with .* callbacks.pipeline_trace="):
        read_trace(tmp_path)
    event = [Event((Action("F", 0, 0),), 0.0, 1.0)]
    write_trace(tmp_path, 1, {3: event})
    with pytest.raises(ConfigError, match=r"rank-00000\.jsonl: missing"):
        read_trace(tmp_path)
    write_trace(tmp_path, 0, {4: event})
    with pytest.raises(ConfigError, match="no step in common"):
        read_trace(tmp_path)
