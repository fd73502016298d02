"""Runs the micro-batches of a step through the stages of this rank, in the order of a schedule of torch's.

torch has the orders of actions, the messages between the stages and the runtime. Here are: 1F1B's order for that
runtime, evaluation, and a schedule for each number of micro-batches.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from dsv3_lightning.common.schedules import SCHEDULES, limit_waiting
from dsv3_lightning.parallel.pipeline.stage import Stage
from dsv3_lightning.parallel.pipeline.torch_stage import Shape, TorchStage, Watch, nobody

FORWARD, SEND_F, RECV_F = _ComputationType.FORWARD, _ComputationType.SEND_F, _ComputationType.RECV_F
UNSHARD, RESHARD = _ComputationType.UNSHARD, _ComputationType.RESHARD

logging.getLogger(schedules.__name__).setLevel(logging.CRITICAL)  # it prints whole schedules where an action fails


class OneForwardOneBackward(_PipelineScheduleRuntime):
    """1F1B by the runtime of the others; torch's own class has another, which gathers parameters elsewhere."""

    def __init__(self, stages: list[Any], n_microbatches: int, **arguments: Any) -> None:
        super().__init__(stages, n_microbatches, **arguments)
        self.pipeline_order = {rank: one_f_one_b(rank, self._num_stages, n_microbatches)
                               for rank in range(self._num_stages)}  # fmt: skip
        self._prepare_schedule_with_comms(self.pipeline_order)


def one_f_one_b(rank: int, ranks: int, micro_batches: int) -> list[_Action | None]:
    """A rank's passes: forward until the first backward pass can arrive, then by turns.

    >>> [str(action) for action in one_f_one_b(1, 3, 3)]
    ['1F0', '1F1', '1B0', '1F2', '1B1', '1B2']
    """
    ahead = ranks - 1 - rank
    turns: list[_Action | None] = []
    for step in range(micro_batches + ahead):
        if step < micro_batches:
            turns.append(_Action(rank, FORWARD, step))
        if step >= ahead:
            turns.append(_Action(rank, _ComputationType.FULL_BACKWARD, step - ahead))
    return turns


class Runner:
    """The schedule for one `Shape`. trains: with backward passes; otherwise forward passes alone, in the same order.

    overlap: torch's custom function for the paired forward and backward actions of DualPipeV. waiting: how many weight
        parts may wait at a time; None: as many as in torch's order.
    """

    def __init__(
        self, stages: Sequence[Stage], shape: Shape, schedule: str, trains: bool, group: dist.ProcessGroup,
        device: torch.device, dtype: torch.dtype, overlap: Any = None, waiting: int | None = None,
    ) -> None:  # fmt: skip
        self.stages = [TorchStage(stage, shape, group, device, dtype) for stage in stages]
        name = SCHEDULES[schedule].torch_name
        made = OneForwardOneBackward if schedule == "1f1b" else getattr(schedules, name)
        loss: dict[str, Any] = {"loss_fn": lambda output, target: output} if trains else {}
        self.schedule = made(self.stages, shape.micro_batches, scale_grads=False, **loss)
        apart = schedule == "dualpipev" and overlap is None
        if apart or waiting is not None:
            reorder(self.schedule, apart, waiting)
        if not trains:
            order = self.schedule.pipeline_order_with_comms
            self.schedule.pipeline_order_with_comms = {rank: forward_only(actions) for rank, actions in order.items()}
        if overlap is not None:
            self.schedule.register_custom_function(_ComputationType.OVERLAP_F_B, overlap)

    def run(self, tokens_BS: Tensor, watch: Watch | None = None, **inputs: Any) -> None:
        """One step, of whole-batch tensors [B, ...]. Raises what failed, without torch's account of the schedule."""
        for stage in self.stages:
            stage.watch = watch or nobody
        failed: BaseException | None = None
        try:
            self.schedule.step(tokens_BS, target=tokens_BS, return_outputs=False, **inputs)
        except RuntimeError as error:
            failed = first_cause(error)
        if failed is not None:
            raise failed


def reorder(schedule: _PipelineScheduleRuntime, apart: bool, waiting: int | None) -> None:
    """Gives each rank's passes another order than torch's. waiting: see `Runner`.

    apart: each pair of passes becomes two actions. torch's runtime sends a pair's results only after both passes, so
    without overlap the next rank would wait for the second pass to get the result of the first.
    """
    order: dict[int, list[_Action | None]] = {}
    for rank, actions in schedule.pipeline_order.items():
        passes = unpaired(actions) if apart else [action for action in actions if action is not None]
        order[rank] = [*limit_waiting(passes, waiting, split_part)]
    schedule._prepare_schedule_with_comms(order)


def split_part(action: _Action) -> tuple[str, tuple[int, int | None]] | None:
    """The kind of an action that is one part of a backward pass, and of which."""
    kinds = {_ComputationType.BACKWARD_INPUT: "I", _ComputationType.BACKWARD_WEIGHT: "W"}
    kind = kinds.get(action.computation_type)
    return None if kind is None else (kind, (action.stage_index, action.microbatch_index))


def forward_only(actions: Sequence[_Action]) -> list[_Action]:
    """What of a rank's actions a forward pass needs; paired actions give their forward one.

    Parameters are gathered before the first pass and freed after the last.
    """
    kept = [action for action in unpaired(actions) if action.computation_type in (FORWARD, SEND_F, RECV_F)]
    stages = sorted({action.stage_index for action in kept if action.computation_type == FORWARD})
    gathered, freed = ([_Action(stage, kind, None) for stage in stages] for kind in (UNSHARD, RESHARD))
    return [*gathered, *kept, *freed]


def unpaired(actions: Sequence[_Action | None]) -> list[_Action]:
    """A rank's actions, with the parts of paired ones one after the other and without idle places."""
    return [part for action in actions if action is not None for part in (action.sub_actions or (action,))]


def first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
