"""A stage as torch's pipeline runtime takes it.

Added are the split of the backward pass into its two parts, receive buffers that exist only while they are used, and
the place where actions can be watched.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from dsv3_lightning.model.weight_grad import WeightQueue
from dsv3_lightning.parallel.pipeline.stage import Stage, sends_embedding

# Called with an action (F, I, W, B, SEND_F, RECV_F, SEND_B, RECV_B or REDUCE_GRAD), the stage's number and the
# micro-batch's (None for REDUCE_GRAD). The context that it makes surrounds the action: of passes and the reduction all
# work, without waiting for messages; of messages only their start.
Watch = Callable[[str, int, int | None], AbstractContextManager[Any]]


class Shape(NamedTuple):
    """What decides the tensors between stages: micro-batches of a step, samples of each, and their positions T."""

    micro_batches: int
    samples: int
    positions: int


def nobody(action: str, stage: int, micro_batch: int | None) -> AbstractContextManager[Any]:
    return nullcontext()


class TorchStage(PipelineStage):
    """A stage as torch's runtime takes it. watch: see `Watch`.

    torch makes buffers for the messages of all micro-batches of a step, before the first. Here these are on the meta
    device, and one is made when a message is awaited and given up after its last use.
    """

    def __init__(self, stage: Stage, shape: Shape, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype):
        first, last = tensors_between(stage, shape, dtype)
        chunk = stage.chunk
        super().__init__(
            stage, chunk.number, chunk.chunks, device, input_args=first, output_args=last, group=group,
            dw_builder=lambda: self.weight_gradients.run,
        )  # fmt: skip
        self.weight_gradients = WeightQueue()  # those of the last backward pass
        self.watch: Watch = nobody

    def _prepare_forward_infra(self, *arguments: Any, **more: Any) -> Any:
        with self.on_meta():
            return super()._prepare_forward_infra(*arguments, **more)

    def _prepare_backward_infra(self, *arguments: Any, **more: Any) -> Any:
        with self.on_meta():
            return super()._prepare_backward_infra(*arguments, **more)

    @contextmanager
    def on_meta(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **more: Any) -> Any:
        with self.watch("F", self.stage_index, fwd_chunk_id):
            result = super().forward_one_chunk(fwd_chunk_id, *arguments, **more)
        if not self.has_backward:
            renew(self.args_recv_info[fwd_chunk_id], torch.device("meta"))
        return result

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self.weight_gradients = WeightQueue()  # torch calls `dw_builder` for what runs it later
        with (
            self.watch("B" if full_backward else "I", self.stage_index, bwd_chunk_id),
            nullcontext() if full_backward else self.weight_gradients.collect(),
        ):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        renew(self.args_recv_info[bwd_chunk_id], torch.device("meta"))
        renew(self.grad_recv_info[bwd_chunk_id], torch.device("meta"))

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
            renew(self.args_recv_info[fwd_chunk_id], self.device)
            return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        with self.watch("SEND_B", self.stage_index, bwd_chunk_id):
            return super().get_bwd_send_ops(bwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        with self.watch("RECV_B", self.stage_index, bwd_chunk_id):
            renew(self.grad_recv_info[bwd_chunk_id], self.device)
            return super().get_bwd_recv_ops(bwd_chunk_id)


def renew(received: Iterable[Any], device: torch.device) -> None:
    """New buffers on the device, in place of those of a message's tensors; a first stage's inputs have none.

    Whether they require gradients stays: torch 2.12 and older say so when it makes them, later ones when it uses them.
    """
    for info in received:
        if (old := getattr(info, "buffer", None)) is not None:
            info.buffer = torch.empty_like(old, device=device, requires_grad=old.requires_grad)


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
