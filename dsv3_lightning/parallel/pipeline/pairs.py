"""The paired actions of DualPipeV (V3 §3.2.1): a forward and a backward pass, of two stages, that take turns.

Whenever gradients have left for experts on other ranks or from them, the forward pass computes up to where its own
tokens leave; meanwhile the gradients arrive. So either pass computes while the other's rows travel. Nothing runs in
parallel on the host: the backward pass calls the forward pass, which is a generator, and all ranks of an ep group do so
at the same places.
"""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.pipelining.schedules import _Action, _PipelineContext, _wait_batch_p2p

from dsv3_lightning.model.block import Block
from dsv3_lightning.model.phases import Phase, phases
from dsv3_lightning.model.rope import cos_sin
from dsv3_lightning.parallel.exchange import Turns
from dsv3_lightning.parallel.pipeline.stage import Stage

Output = Tensor | tuple[Tensor, ...]
UNDER_WAY = ("dispatch", "send back")  # after these phases tokens or outputs travel


def stage_phases(
    stage: Stage, *inputs: Tensor, mask: Tensor, targets: Tensor | None = None, documents: Tensor | None = None
) -> Generator[Phase, None, Output]:
    """The forward pass of a stage, in the phases of its MoE layers. MTP modules are part of the last phase."""
    start = stage.begin(inputs, mask, targets, documents)
    h_BTD, stats = start.h_BTD, []
    rope = cos_sin(stage.config, torch.arange(h_BTD.shape[1], device=h_BTD.device))
    for block in cast(list[Block], stage.layers):
        h_BTD, layer_stats = yield from phases(block, stage.recompute, h_BTD, rope, start.mask_BT, start.documents)
        if layer_stats is not None:
            stats.append(layer_stats)
    return stage.end(h_BTD, stats, start, mask, targets)


class ForwardPass:
    """A forward pass that goes on when it is asked to; see `exchange.Other`. output: None until it has ended."""

    def __init__(self, stage: Stage, passes: Generator[Phase, None, Output]) -> None:
        self.stage, self.passes = stage, passes
        self.done: Phase | None = None
        self.output: Output | None = None

    def go_on(self) -> None:
        """One phase. The backward pass has gradients off, and no autocast."""
        if self.output is not None:
            return
        with torch.enable_grad(), self.stage.autocast():
            try:
                self.done = next(self.passes)
            except StopIteration as end:
                self.output = end.value

    def before(self) -> None:
        """Lets tokens leave whose numbers the host has had to wait for: messages of one group follow each other."""
        if self.done == "dispatch":
            self.go_on()

    def after(self) -> None:
        """Computes until tokens or outputs travel again."""
        self.go_on()
        while self.output is None and self.done not in UNDER_WAY:
            self.go_on()

    def finish(self) -> Output:
        while self.output is None:
            self.go_on()
        return self.output


def in_turns(stage: Stage, backward: Callable[[], None], *inputs: Tensor, **arguments: Tensor) -> Output:
    """The output of a stage whose forward pass takes turns with a backward pass, which is run as well."""
    ahead = ForwardPass(stage, stage_phases(stage, *inputs, **arguments))
    ahead.after()
    with Turns.given_to(ahead):
        backward()
    return ahead.finish()


def run_pair(action: _Action, context: _PipelineContext) -> None:
    """torch's custom function for OVERLAP_F_B: what its runtime does for the two passes, but in turns."""
    assert action.sub_actions is not None
    forward, backward = action.sub_actions
    schedule: Any = context.schedule_ref
    stages = {stage.stage_index: stage for stage in schedule._stages}
    with_forward = stages[forward.stage_index]
    receive_forward(schedule, stages, forward)
    receive_backward(schedule, stages, backward)
    # A paired stage's forward pass is this function instead of its module; the rest of torch's bookkeeping stays.
    with_forward.forward_maybe_with_nosync = partial(
        in_turns, with_forward.submod, partial(run_backward, schedule, stages, backward)
    )
    try:
        run_forward(schedule, stages, forward, context)
    finally:
        del with_forward.forward_maybe_with_nosync


def receive_forward(schedule: Any, stages: dict[int, Any], action: _Action) -> None:
    """Waits for what the stage before has sent, unless it is on this rank."""
    schedule._assert_unsharded(stages[action.stage_index])
    if action.stage_index > 0 and action.stage_index - 1 not in stages:
        _wait_batch_p2p(schedule.fwd_recv_ops.pop((action.stage_index, action.microbatch_index)))


def receive_backward(schedule: Any, stages: dict[int, Any], action: _Action) -> None:
    stage = stages[action.stage_index]
    schedule._assert_unsharded(stage)
    if not stage.is_last and action.stage_index + 1 not in stages:
        _wait_batch_p2p(schedule.bwd_recv_ops.pop((action.stage_index, action.microbatch_index)))


def run_forward(schedule: Any, stages: dict[int, Any], action: _Action, context: _PipelineContext) -> None:
    stage, number = stages[action.stage_index], action.microbatch_index
    assert context.arg_mbs is not None and context.kwarg_mbs is not None and number is not None
    output = stage.forward_one_chunk(
        number, context.arg_mbs[number], context.kwarg_mbs[number], save_forward_output=False
    )
    schedule._maybe_compute_loss(stage, output, context.target_mbs, number)
    if action.stage_index + 1 in stages:
        stages[action.stage_index + 1].set_local_fwd_input(output, number)


def run_backward(schedule: Any, stages: dict[int, Any], action: _Action) -> None:
    stage, number = stages[action.stage_index], action.microbatch_index
    schedule.backward_counter[action.stage_index] += 1
    last = schedule.backward_counter[action.stage_index] == schedule._n_microbatches
    loss = schedule._maybe_get_loss(stage, number)
    stage.backward_one_chunk(number, loss=loss, full_backward=True, last_backward=last)
    if action.stage_index - 1 in stages:
        stages[action.stage_index - 1].set_local_bwd_input(stage.get_local_bwd_output(number), number)
