"""Traces of pipelines: what is recorded of a rank, and its bubble. tests/parallel/pipeline has real ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from dsv3_lightning.callbacks.pipeline_trace import Recorder, bubble_share, joined
from dsv3_lightning.cli import main
from dsv3_lightning.planning.pipeline.actions import Action, schedule_slots
from dsv3_lightning.planning.pipeline.timeline import ChunkTimes, Event, Timeline, simulate


@contextmanager
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_passes_that_overlap_are_one_slot():
    forward, backward = Action("F", 0, 3), Action("B", 3, 1)
    apart = [Event((forward,), 0.0, 1.0), Event((backward,), 1.0, 3.0)]
    assert joined(apart[::-1]) == apart
    assert joined([Event((backward,), 0.5, 3.0), Event((forward,), 0.0, 2.0)]) == [Event((forward, backward), 0.0, 3.0)]
    inside = [Event((forward,), 0.0, 4.0), Event((backward,), 1.0, 3.0)]
    assert joined(inside) == [Event((forward, backward), 0.0, 4.0)]


def test_only_passes_are_recorded():
    with alone():
        recorder = Recorder(torch.device("cpu"), dist.group.WORLD)
    for action, micro_batch in (("RECV_F", 0), ("F", 0), ("SEND_F", 0), ("REDUCE_GRAD", None)):
        with recorder.watch(action, 1, micro_batch):
            pass
    assert [str(event.slot[0]) for event in recorder.events()] == ["1F0"]
    assert 0 <= recorder.events()[0].start <= recorder.events()[0].end


def test_a_rank_alone_waits_for_what_is_between_its_passes():
    timeline = Timeline([simulate(schedule_slots("zbv", 2, 4), ChunkTimes.equal(4, I=2.0), 4).ranks[0]])
    with alone():
        found = bubble_share(timeline.ranks[0], dist.group.WORLD, torch.device("cpu"))
    assert found == pytest.approx(timeline.bubble_share)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["callbacks.pipeline_trace={every_n_steps: 2}"],
         "callbacks.pipeline_trace: there is no pipeline; set it to null, or strategy.pipeline_parallel"),
        (["callbacks.pipeline_trace={every_n_steps: 0}"], "pipeline_trace.every_n_steps=0: must be at least 1"),
        (["callbacks.pipeline_trace={keep: 0}"], "callbacks.pipeline_trace.keep=0: must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_traced_is_refused_in_one_line(words: list[str], message: str, capsys):
    assert main(["validate", "nano", *words]) == 2
    assert message in capsys.readouterr().err
