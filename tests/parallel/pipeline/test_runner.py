"""The order of passes and messages, without processes."""

from unittest.mock import create_autospec

from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

from dsv3_lightning.parallel.pipeline.runner import reorder, unpaired


def dualpipev(ranks: int, micro_batches: int) -> ScheduleDualPipeV:
    stage = create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.submod, stage.num_stages = 0, ranks, None, 2 * ranks
    return ScheduleDualPipeV([stage, stage], micro_batches)


def test_without_overlap_each_result_is_sent_before_the_next_pass():
    schedule = dualpipev(ranks=2, micro_batches=4)
    passes = {rank: unpaired(actions) for rank, actions in schedule.pipeline_order.items()}
    reorder(schedule, apart=True, waiting=None)
    sends = {"SEND_F": "FORWARD", "SEND_B": "BACKWARD"}
    for rank, actions in schedule.pipeline_order_with_comms.items():
        assert [action for action in actions if action in passes[rank]] == passes[rank]
        latest, sent = None, 0
        for action in actions:
            if action in passes[rank]:
                latest = action
            elif kind := sends.get(action.computation_type.name):
                assert latest.stage_index == action.stage_index, (rank, str(latest), str(action))
                assert latest.microbatch_index == action.microbatch_index
                assert kind in latest.computation_type.name
                sent += 1
        assert sent == 8  # 4 micro-batches, forward and backward
