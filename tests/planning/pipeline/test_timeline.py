"""Simulated timelines, against the published formulas where these hold, and against stored simulations elsewhere."""

import pytest

from dsv3_lightning.common.schedules import SCHEDULES
from dsv3_lightning.planning.pipeline.actions import Action, schedule_slots
from dsv3_lightning.planning.pipeline.formulas import FORMULA_OF, formulas
from dsv3_lightning.planning.pipeline.timeline import (
    ChunkTimes,
    Event,
    Held,
    Timeline,
    peak_chunks,
    peak_live,
    simulate,
)


def timeline(name: str, ranks: int, micro_batches: int, transfer: float = 0.0, **times: float) -> Timeline:
    chunks = ranks * SCHEDULES[name].chunks
    return simulate(schedule_slots(name, ranks, micro_batches), ChunkTimes.equal(chunks, **times), chunks, transfer)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    ("name", "together"), [*((name, 1.0) for name in SCHEDULES), ("dualpipev", 0.8), ("dualpipev", 2 / 3)]
)
def test_bubbles_and_activations_are_the_formulas_where_forward_input_and_weight_parts_are_equal(
    name: str, ranks: int, together: float
):
    v = SCHEDULES[name].chunks
    found = formulas(ranks, F=v, B=2 * v, W=v, pair=3 * v * together)[FORMULA_OF[name]]
    for micro_batches in (2 * ranks, 4 * ranks):
        ran = timeline(name, ranks, micro_batches, together=together)
        idle = ran.idle_within if name == "zbv" else ran.idle
        assert max(idle) == pytest.approx(found.bubble)
        live = [peak_chunks(events) for events in ran.ranks]
        assert max(live) == v * found.activations


def test_1f1b_has_its_bubble_and_activations_for_any_times():
    ran = timeline("1f1b", 4, 12, F=1.0, I=1.3, W=0.4)
    assert ran.idle == pytest.approx([3 * 2.7] * 4)
    assert ran.bubble_share == pytest.approx(3 * 2.7 / (15 * 2.7))
    assert [peak_chunks(events) for events in ran.ranks] == [4, 3, 2, 1]


# Idle seconds of the rank that waits longest, with F = 1 and 2P micro-batches, from simulations of torch's lists.
STORED = {
    ("interleaved_zero_bubble", 2, 1.2, 0.8): 1.4,
    ("interleaved_zero_bubble", 2, 0.8, 1.2): 1.0,  # the formula says 0.6
    ("zbv", 2, 1.2, 0.8): 1.2,
    ("zbv", 4, 1.0, 1.0): 3.0,  # of the whole span; 0 from each rank's first to its last action
    ("dualpipev", 2, 1.2, 0.8): 2.4,  # 2.6
    ("dualpipev", 2, 0.8, 1.2): 2.0,  # 1.4
}


@pytest.mark.parametrize(("name", "ranks", "inputs", "weights"), STORED)
def test_bubbles_elsewhere_are_those_of_stored_simulations(name: str, ranks: int, inputs: float, weights: float):
    ran = timeline(name, ranks, 2 * ranks, I=inputs, W=weights)
    assert max(ran.idle) == pytest.approx(STORED[name, ranks, inputs, weights])


def test_transfers_by_hand():
    # 0: F0 F1 . . . . B0 B1, each transfer takes 1: chunk 1 starts at 2, its first gradient arrives at 2 + 1 + 2 + 1
    ran = timeline("1f1b", 2, 2, transfer=1.0)
    assert [(str(e.slot[0]), e.start, e.end) for e in ran.ranks[1]] == [
        ("1F0", 2, 3), ("1B0", 3, 5), ("1F1", 5, 6), ("1B1", 6, 8),
    ]  # fmt: skip
    assert [(str(e.slot[0]), e.start, e.end) for e in ran.ranks[0]] == [
        ("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 6, 8), ("0B1", 9, 11),
    ]  # fmt: skip
    # neighboring chunks of a rank hand over without a transfer: of a V, the last rank's two
    assert timeline("zbv", 1, 3, transfer=5.0).span == timeline("zbv", 1, 3).span == 18


def test_chunks_of_different_cost():
    times = ChunkTimes([1.0, 3.0], [1.0, 3.0], [1.0, 3.0])
    ran = simulate(schedule_slots("1f1b", 2, 4), times, 2)
    assert ran.busy(0) == 12 and ran.busy(1) == 36
    assert ran.span == 1 + 36 + 2  # the slow rank never waits after its first action
    assert ran.bubble_share == pytest.approx((27 + 3) / 78)
    assert ran.own_bubble_share == pytest.approx(27 / (39 + 36))


def test_lists_that_wait_for_each_other_are_an_error():
    slots = [[(Action("B", 0, 0),), (Action("F", 0, 0),)], [(Action("F", 1, 0),), (Action("B", 1, 0),)]]
    with pytest.raises(ValueError, match=r"wait for each other: 0B0, 1F0"):
        simulate(slots, ChunkTimes.equal(2), 2)


def test_what_is_live_becomes_what_waits_for_the_weight_part():
    events = [
        Event((Action(kind, chunk, 0),), float(i), i + 1.0)
        for i, (kind, chunk) in enumerate([("F", 0), ("F", 1), ("I", 1), ("I", 0), ("W", 1), ("W", 0)])
    ]
    same = [Held(2, 2, 2, 2), Held(5, 5, 5, 5)]
    assert peak_live(events, same) == 7
    assert peak_live([*events, Event((Action("F", 0, 1),), 6.0, 7.0)], same) == 7
    assert peak_live(events, [Held(2, 2, 9, 9), Held(5, 5, 5, 4)]) == 13  # 7, then 2 + 4, then 9 + 4
    assert (
        peak_live(events[:3], [Held(2, 2, 2, 1), Held(5, 5, 8, 6)]) == 10
    )  # an input part holds 8 while it makes 6 of 5
    assert (
        peak_live([Event((Action("F", 0, m), Action("B", 0, m)), m, m + 1.0) for m in (0, 1)], [Held(3, 4, 9, 9)]) == 4
    )
