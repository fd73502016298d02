"""Each rank's list of actions, against torch's own schedules."""

from collections import Counter

import pytest
from torch.distributed.pipelining import schedules as torchs
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from dsv3_lightning.common.schedules import SCHEDULES, fitting_micro_batches, placement
from dsv3_lightning.planning.pipeline.actions import Action, schedule_slots

KINDS = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}
SIZES = [(ranks, fitting) for ranks in (1, 2, 3, 4, 8) for fitting in (1, 2, 4, 5, 6, 8, 9, 12, 16, 17, 24)]


def torchs_slots(name: str, ranks: int, micro_batches: int, chunks: int) -> list[list[tuple[Action, ...]]]:
    made = getattr(torchs, SCHEDULES[name].torch_name)
    found = get_schedule_ops(made, ranks, micro_batches, chunks)

    def ours(action) -> tuple[Action, ...]:
        parts = action.sub_actions or (action,)
        return tuple(Action(KINDS[p.computation_type.name], p.stage_index, p.microbatch_index) for p in parts)

    return [[ours(a) for a in rank if a is not None and a.computation_type.name != "REDUCE_GRAD"] for rank in found]


@pytest.mark.parametrize(
    ("name", "chunks"),
    [("interleaved_1f1b", 2), ("interleaved_1f1b", 3), ("interleaved_zero_bubble", 2), ("interleaved_zero_bubble", 3),
     ("zbv", 2), ("dualpipev", 2)],
)  # fmt: skip
def test_the_actions_of_each_rank_are_torchs(name: str, chunks: int):
    for ranks, micro_batches in SIZES:
        if fitting_micro_batches(name, ranks, micro_batches) == micro_batches:
            expected = torchs_slots(name, ranks, micro_batches, chunks)
            assert schedule_slots(name, ranks, micro_batches, chunks) == expected, (ranks, micro_batches)


@pytest.mark.parametrize("name", [name for name, schedule in SCHEDULES.items() if schedule.splits])
def test_no_more_weight_parts_wait_than_are_allowed(name: str):
    for ranks, micro_batches in ((2, 4), (4, 12), (8, 17)):
        plain = schedule_slots(name, ranks, fitting_micro_batches(name, ranks, micro_batches))
        for limit in (1, 2, 99):
            limited = schedule_slots(name, ranks, fitting_micro_batches(name, ranks, micro_batches), waiting=limit)
            assert most_waiting(limited) == min(limit, most_waiting(plain))
            assert (limited == plain) == (limit >= most_waiting(plain))
            for mine, expected in zip(limited, plain, strict=True):
                assert Counter(mine) == Counter(expected)
                others = [[slot for slot in each if slot[0].kind != "W"] for each in (mine, expected)]
                assert others[0] == others[1]  # weight parts alone have moved
                for chunk in {slot[0].chunk for slot in mine}:  # gradients of a weight are added up in the same order
                    found = [[slot for slot in each if slot[0][:2] == ("W", chunk)] for each in (mine, expected)]
                    assert found[0] == found[1]


def most_waiting(slots: list) -> int:
    """Of the rank where most weight parts wait at a time."""
    most = 0
    for mine in slots:
        change = {"I": 1, "W": -1}
        waiting = [sum(change.get(a.kind, 0) for slot in mine[:i] for a in slot) for i in range(len(mine) + 1)]
        most = max(most, *waiting)
    return most


def test_1f1b_by_hand():
    """torch's list for display shows the last rank's forward passes one too far; this is what it executes."""
    words = [" ".join(str(slot[0]) for slot in rank) for rank in schedule_slots("1f1b", 3, 4)]
    assert words == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_rank_does_everything_of_its_chunks_once_and_in_order(name: str):
    for ranks, wanted in SIZES:
        micro_batches = fitting_micro_batches(name, ranks, wanted)
        slots = schedule_slots(name, ranks, micro_batches)
        for mine, chunks in zip(slots, placement(SCHEDULES[name], ranks), strict=True):
            done = Counter(action for slot in mine for action in slot)
            assert set(done.values()) == {1}
            for chunk in chunks:
                for m in range(micro_batches):
                    ways = {kind for kind in "FBIW" if Action(kind, chunk, m) in done}
                    assert ways in ({"F", "B"}, {"F", "I", "W"})
            order = [action for slot in mine for action in slot]
            for action in order:
                if action.kind == "W":
                    assert order.index(action) > order.index(action._replace(kind="I"))
