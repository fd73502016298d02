"""The table of pipeline schedules, against torch's own classes."""

from unittest import mock

import pytest
import torch.distributed.pipelining.schedules as torchs
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import generate_rank_to_stage_mapping

from dsv3_lightning.common.schedules import SCHEDULES, fitting_micro_batches, placement, valid_chunks


def accepts(name: str, ranks: int, chunks: int, micro_batches: int) -> bool:
    """Whether torch makes the schedule."""
    stage = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, ranks, ranks * chunks, None
    made = getattr(torchs, SCHEDULES[name].torch_name)
    try:
        made(stage if chunks == 1 else [stage] * chunks, micro_batches)
    except (ValueError, AssertionError):
        return False
    return True


@pytest.mark.parametrize("name", SCHEDULES)
def test_valid_numbers_of_micro_batches_are_those_that_torch_takes(name: str):
    chunks = SCHEDULES[name].chunks
    for ranks in (2, 3, 4):
        valid = [m for m in range(1, 20) if accepts(name, ranks, chunks, m)]
        for wanted in range(1, 12):
            fitting = fitting_micro_batches(name, ranks, wanted)
            assert fitting in valid, (ranks, wanted)
            assert abs(fitting - wanted) == min(abs(m - wanted) for m in valid), (ranks, wanted)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_placement_of_chunks_is_torchs(name: str):
    schedule = SCHEDULES[name]
    for ranks in (1, 2, 5):
        style = "v" if schedule.v_shaped else "loop"
        expected = generate_rank_to_stage_mapping(ranks, ranks * schedule.chunks, style=style)
        assert placement(schedule, ranks) == [sorted(expected[rank]) for rank in range(ranks)]


def test_v_schedules_have_two_chunks_and_interleaved_ones_two_or_more():
    assert [name for name in SCHEDULES if valid_chunks(SCHEDULES[name], 1)] == ["1f1b"]
    assert [name for name in SCHEDULES if valid_chunks(SCHEDULES[name], 2)] == list(SCHEDULES)[1:]
    assert [name for name in SCHEDULES if valid_chunks(SCHEDULES[name], 3)] == list(SCHEDULES)[1:3]
