"""Runs the micro-batches of a step through the stages of this rank, in the order of a schedule of torch's.

torch has the orders of actions, the messages between the stages and the runtime. Here are: 1F1B's order for that
runtime, the split of the backward pass into its two parts, receive buffers that exist only while they are used,
evaluation, and the place where actions can be watched.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from dsv3_lightning.common.schedules import SCHEDULES
from dsv3_lightning.model.weight_grad import WeightQueue
from dsv3_lightning.parallel.pipeline.stage import Stage, sends_embedding

# Called with an action (F, I, W, B, SEND_F, RECV_F, SEND_B, RECV_B or REDUCE_GRAD), the stage's number and the
# micro-batch's (None for REDUCE_GRAD). The context that it makes surrounds the action: of passes and the reduction all
# work, without waiting for messages; of messages only their start.
Watch = Callable[[str, int, int | None], AbstractContextManager[Any]]
KEPT_IN_EVALUATION = ("FORWARD", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")

logging.getLogger(schedules.__name__).setLevel(logging.CRITICAL)  # it prints whole schedules where an action fails


class Shape(NamedTuple):
    """What decides the tensors between stages: micro-batches of a step, samples of each, and their positions T."""

    micro_batches: int
    samples: int
    positions: int


def nobody(action: str, stage: int, micro_batch: int | None) -> AbstractContextManager[Any]:
    return nullcontext()


class WatchedStage(PipelineStage):
    """A stage as torch's runtime takes it. watch: see `Watch`."""

    def __init__(self, stage: Stage, shape: Shape, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype):
        first, last = tensors_between(stage, shape, dtype)
        chunk = stage.chunk
        super().__init__(
            stage, chunk.number, chunk.chunks, device, input_args=first, output_args=last, group=group,
            dw_builder=lambda: self.weight_gradients.run,
        )  # fmt: skip
        self.weight_gradients = WeightQueue()  # those of the last backward pass
        self.watch: Watch = nobody

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.watch("F", self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self.weight_gradients = WeightQueue()  # torch calls `dw_builder` for what runs it later
        with (
            self.watch("B" if full_backward else "I", self.stage_index, bwd_chunk_id),
            nullcontext() if full_backward else self.weight_gradients.collect(),
        ):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self.watch("W", self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        with self.watch("REDUCE_GRAD", self.stage_index, None):
            super().perform_reduce_grad(grad_scale_factor)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        with self.watch("SEND_F", self.stage_index, fwd_chunk_id):
            return super().get_fwd_send_ops(fwd_chunk_id)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        with self.watch("RECV_F", self.stage_index, fwd_chunk_id):
            return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        with self.watch("SEND_B", self.stage_index, bwd_chunk_id):
            return super().get_bwd_send_ops(bwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        with self.watch("RECV_B", self.stage_index, bwd_chunk_id):
            return super().get_bwd_recv_ops(bwd_chunk_id)


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
            turns.append(_Action(rank, _ComputationType.FORWARD, step))
        if step >= ahead:
            turns.append(_Action(rank, _ComputationType.FULL_BACKWARD, step - ahead))
    return turns


class Runner:
    """The schedule for one `Shape`. trains: with backward passes; otherwise forward passes alone, in the same order.

    overlap: torch's custom function for the paired forward and backward actions of DualPipeV.
    """

    def __init__(
        self, stages: Sequence[Stage], shape: Shape, schedule: str, trains: bool, group: dist.ProcessGroup,
        device: torch.device, dtype: torch.dtype, overlap: Any = None,
    ) -> None:  # fmt: skip
        self.stages = [WatchedStage(stage, shape, group, device, dtype) for stage in stages]
        name = SCHEDULES[schedule].torch_name
        made = OneForwardOneBackward if schedule == "1f1b" else getattr(schedules, name)
        loss: dict[str, Any] = {"loss_fn": lambda output, target: output} if trains else {}
        self.schedule = made(self.stages, shape.micro_batches, scale_grads=False, **loss)
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


def forward_only(actions: Sequence[_Action]) -> list[_Action]:
    """What of a rank's actions a forward pass needs; paired actions give their forward one."""
    single = [part for action in actions for part in (action.sub_actions or (action,))]
    return [action for action in single if action.computation_type.name in KEPT_IN_EVALUATION]


def first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def tensors_between(stage: Stage, shape: Shape, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a stage takes and what it returns, for a micro-batch, on the meta device."""
    B, T, config = shape.samples, shape.positions, stage.config

    def meta(*size: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta", requires_grad=grad)

    passed = [meta(B, T, config.hidden_size, dtype=dtype)]
    if sends_embedding(stage):
        passed.append(meta(B, T + config.mtp_depth, config.hidden_size, dtype=dtype))
    tokens = meta(B, T + 1 + config.mtp_depth, dtype=torch.int64, grad=False)
    first = (tokens,) if stage.chunk.is_first else tuple(passed)
    last = (meta(dtype=torch.float32),) if stage.chunk.is_last else tuple(passed)
    return first, last
