"""A planned step of a pipeline: its timeline, its time by part on the busiest rank, and its bubble."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dsv3_lightning.common.schedules import SCHEDULES, placement
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.flops import training_flop_per_token
from dsv3_lightning.planning.hardware import Hardware
from dsv3_lightning.planning.layout import Layout
from dsv3_lightning.planning.parts import COMPUTE, COMPUTING, Part
from dsv3_lightning.planning.pipeline.actions import Slot, schedule_slots
from dsv3_lightning.planning.pipeline.timeline import Timeline, simulate
from dsv3_lightning.planning.pipeline.times import PlannedTimes, planned_times
from dsv3_lightning.planning.share import Share, chunk_shares, together
from dsv3_lightning.planning.step import Exposed, Step
from dsv3_lightning.planning.wires import EXCHANGE, exchange, parameters, replicas


@dataclass(frozen=True)
class Pipeline:
    """How a model is spread over the ranks of a pipeline. layers: of each chunk.

    overlap: paired passes of DualPipeV exchange tokens while the other one computes. waiting: strategy.waiting_weights.
    """

    schedule: str
    ranks: int
    layers: Sequence[int]
    overlap: bool = False
    waiting: int | None = None

    @property
    def placement(self) -> list[list[int]]:
        return placement(SCHEDULES[self.schedule], self.ranks, len(self.layers) // self.ranks)

    def slots(self, micro_batches: int) -> list[list[Slot]]:
        """What each rank does in a step of so many micro-batches."""
        chunks = len(self.layers) // self.ranks
        return schedule_slots(self.schedule, self.ranks, micro_batches, chunks, self.waiting)


class PipelineStep(NamedTuple):
    """A planned step. step: by part, of the busiest rank. times: of the chunks.

    transfer: seconds of one message between stages, in which activations travel.
    """

    timeline: Timeline
    step: Step
    times: PlannedTimes
    shares: list[Share]
    busiest: int
    transfer: float


def pipeline_step(model: ModelConfig, hardware: Hardware, layout: Layout, pipeline: Pipeline) -> PipelineStep:
    """The planned step of a pipeline. The layout is that of one data-parallel rank of a stage; work.micro_batches are
    the pipeline's."""
    shares, work = chunk_shares(model, pipeline.layers), layout.work
    times = planned_times(model, hardware, layout, shares, pipeline.overlap)
    slots = pipeline.slots(work.micro_batches)
    message, names = transfer(model, hardware, layout, pipeline.ranks)
    timeline = simulate(slots, times, len(shares), message)
    alone = simulate(slots, times, len(shares))
    busiest = max(range(pipeline.ranks), key=timeline.busy)
    own = replace(layout, share=together(shares[i] for i in pipeline.placement[busiest]))
    exposed = [Exposed(part, part.seconds) for each in COMPUTE for part in each(model, hardware, own) if part.ways]
    on_wires = exchange(model, hardware, own)
    if on_wires:
        rest = timeline.busy(busiest) - sum(each.seconds for each in exposed)
        total, source = sum(part.seconds for part in on_wires), on_wires[0].source
        hidden = (*source, "overlap.kept") if pipeline.overlap else source
        exposed.append(Exposed(Part(EXCHANGE, total, COMPUTING, hidden), rest))
    moved = work.micro_batches * messages(pipeline.placement, busiest) * message
    exposed += [
        Exposed(Part(BUBBLE, alone.idle[busiest], (), ()), alone.idle[busiest]),
        Exposed(Part(TRANSFERS, moved, COMPUTING, names), timeline.span - alone.span),
    ]
    exposed += once_per_step(
        model, hardware, layout, [together(shares[i] for i in mine) for mine in pipeline.placement]
    )
    tokens = work.tokens * work.micro_batches // pipeline.ranks
    flop = training_flop_per_token(model, work.sequence_length) * work.tokens * work.micro_batches / pipeline.ranks
    return PipelineStep(timeline, Step(exposed, tokens, flop), times, shares, busiest, message)


def messages(of_ranks: Sequence[Sequence[int]], rank: int) -> int:
    """How many messages a rank receives per micro-batch. Neighboring chunks of a rank send each other none.

    >>> messages([[0, 3], [1, 2]], 0), messages([[0, 3], [1, 2]], 1), messages([[0, 2], [1, 3]], 1)
    (2, 2, 3)
    """
    others = {chunk for i, mine in enumerate(of_ranks) if i != rank for chunk in mine}
    return sum((chunk - 1 in others) + (chunk + 1 in others) for chunk in of_ranks[rank])


BUBBLE, TRANSFERS = "bubble: waiting for other ranks", "activations between stages"


def transfer(model: ModelConfig, hardware: Hardware, layout: Layout, ranks: int) -> tuple[float, tuple[str, ...]]:
    """Seconds of a message between stages, and its coefficients: the hidden state and, where there are sequential MTP
    modules, the embedding, of a micro-batch."""
    beside = layout.mesh.dp_replicate * layout.mesh.dp_shard * ranks <= hardware.gpu.per_node
    where = "inside" if beside else "between"
    sent = 2 if model.mtp_depth and model.mtp_kind == "sequential" else 1
    moved = sent * layout.work.residual * layout.work.tokens * model.hidden_size
    names = (f"ring.{where}", "collective.start", f"hop.{where}")
    return moved / hardware.link(where, "ring") + sum(hardware.rate(name) for name in names[1:]), names


def once_per_step(model: ModelConfig, hardware: Hardware, layout: Layout, ranks: Sequence[Share]) -> list[Exposed]:
    """What each rank does once per step, of the rank that takes longest: parameters are gathered before its first pass
    and gradients reduced after its last one, which hides under nothing."""
    once = replace(layout, code=replace(layout.code, zero1=True))

    def of(share: Share) -> list[Part]:
        own = replace(once, share=share)
        found = [part for each in (*COMPUTE, parameters, replicas) for part in each(model, hardware, own)]
        return [part for part in found if not part.ways and part.name != "first gather and last reduction"]

    slowest = max((of(share) for share in ranks), key=lambda parts: sum(part.seconds for part in parts))
    return [Exposed(part._replace(hidden_under=()), part.seconds) for part in slowest]
