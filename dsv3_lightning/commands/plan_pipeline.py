"""What a pipeline adds to `dsv3 plan`: its timeline, bubbles beside the published formulas, and each rank's memory."""

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_lightning.common.paths import display_path, user_path
from dsv3_lightning.common.plots import save_figure
from dsv3_lightning.common.table import si, table
from dsv3_lightning.config.checks import mesh_strategy
from dsv3_lightning.config.pipeline import check_batches
from dsv3_lightning.config.schema import Config
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.mesh import StrategyConfig
from dsv3_lightning.parallel.pipeline.checks import micro_batches_of
from dsv3_lightning.planning.cluster import RankMemory
from dsv3_lightning.planning.hardware import Hardware
from dsv3_lightning.planning.layout import Layout, Work
from dsv3_lightning.planning.pipeline import drawing
from dsv3_lightning.planning.pipeline.actions import Action
from dsv3_lightning.planning.pipeline.formulas import FORMULA_OF, formulas
from dsv3_lightning.planning.pipeline.measured import measured_times, read_trace
from dsv3_lightning.planning.pipeline.memory import pipeline_memory
from dsv3_lightning.planning.pipeline.step import TRANSFERS, Pipeline, PipelineStep, pipeline_step
from dsv3_lightning.planning.pipeline.timeline import ChunkTimes, Timeline, Times, peak_chunks, simulate
from dsv3_lightning.planning.wires import EXCHANGE
from dsv3_lightning.training.stages import chunk_layers


@dataclass(frozen=True)
class PipelineFlags:
    """The flags of a pipeline. schedule, pipeline_parallel, micro_batches: in place of those of the strategy block.

    overlap: as strategy.overlap=pairs, the exchange of a paired pass runs under the other's computing. times: a run's
        folder, or F,I,W or F,I,W,F&B in seconds. png: a file for the figure.
    """

    schedule: str | None = None
    pipeline_parallel: int | None = None
    micro_batches: int | None = None
    overlap: bool = False
    times: str | None = None
    png: Path | None = None


def with_pipeline(config: Config, flags: PipelineFlags) -> Config:
    """The config with the pipeline of the flags in its strategy block. Raises ConfigError if there is none to plan."""
    given = {name: value for name, value in asdict(flags).items()
             if name in ("schedule", "pipeline_parallel", "micro_batches") and value is not None}  # fmt: skip
    own = mesh_strategy(config.strategy)
    if given:
        kind = own or StrategyConfig(kind="fsdp2_ep" if config.model.num_moe_layers else "fsdp2")
        block = config.strategy if isinstance(config.strategy, dict) and own else {"kind": kind.kind}
        if given.get("pipeline_parallel", kind.pipeline_parallel) > 1 or len(given) > 1:
            own = mesh_strategy({**block, **given})
            config = replace(config, strategy={**block, **given})
    if own is None or own.pipeline_parallel == 1:
        for name, value in asdict(flags).items():
            if value:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag}: needs a pipeline; add --pipeline-parallel P, of at least 2")
    return config


class Planned(NamedTuple):
    """A planned pipeline: its settings, the work of a data-parallel rank of a stage, its step and each rank's memory.

    timeline, times: those of the step, or by times that are given.
    """

    pipeline: Pipeline
    layout: Layout
    step: PipelineStep
    memory: list[RankMemory]
    timeline: Timeline
    times: Times


def pipeline_work(config: Config, strategy: StrategyConfig, data_ranks: int) -> Work:
    """The work of a data-parallel rank: the step split over these ranks and the pipeline's micro-batches.

    Raises ConfigError, naming the nearest batch that divides.
    """
    trainer, data, micro_batches = config.trainer, config.data, micro_batches_of(strategy)
    check_batches(strategy, data, data_ranks)
    precision = "bf16-mixed" if trainer["precision"] == "auto" else trainer["precision"]
    T, policy = data.sequence_length, config.compute.activation_checkpointing
    tokens = data.batch_size // (data_ranks * micro_batches) * T
    optimizer = config.optimizer
    return Work(tokens, micro_batches, T, precision, policy, moment=optimizer.moment_bytes, kind=optimizer.kind,
                fp8=config.compute.fp8)  # fmt: skip


def plan_pipeline(
    config: Config, strategy: StrategyConfig, layout: Layout, hardware: Hardware, overlap: bool
) -> Planned:
    """The planned step and memory of a pipeline. overlap: as with strategy.overlap=pairs."""
    overlap = overlap or strategy.overlap == "pairs"
    if overlap and strategy.schedule != "dualpipev":
        raise ConfigError(f"--overlap: {strategy.schedule} pairs no passes; only dualpipev does")
    model, layers = config.model, chunk_layers(strategy, config.model, config.data.sequence_length)
    assert layers is not None
    pipeline = Pipeline(strategy.schedule, strategy.pipeline_parallel, layers, overlap, strategy.waiting_weights)
    found = pipeline_step(model, hardware, layout, pipeline)
    memory = pipeline_memory(model, layout.mesh, layout.work, found.shares, pipeline.placement, found.timeline)
    return Planned(pipeline, layout, found, memory, found.timeline, found.times)


def pipeline_tables(planned: Planned, flags: PipelineFlags) -> list[str]:
    """The timeline, its bubble beside the formulas, and what each rank computes and holds."""
    pipeline, work = planned.pipeline, planned.layout.work
    if flags.times is not None:
        chunks = len(pipeline.layers)
        times = given_times(flags.times, chunks)
        planned = planned._replace(timeline=simulate(pipeline.slots(work.micro_batches), times, chunks), times=times)
    title = (
        f"{pipeline.schedule} on {pipeline.ranks} ranks, {work.micro_batches} micro-batches of {work.tokens:,} tokens"
    )
    timeline = planned.timeline
    drawn = drawing.text(timeline, shutil.get_terminal_size().columns)
    if flags.png is not None:
        save_figure(drawing.figure({title: timeline}), flags.png)
        drawn += f"\n{display_path(flags.png)}"
    return [f"{title}\n{drawn}", bubble_table(planned), formula_table(planned), rank_table(planned)]


def given_times(text: str, chunks: int) -> Times:
    """Seconds of passes from --times. Raises ConfigError."""
    if (run := user_path(text)).is_dir():
        found = read_trace(run)
        traced = 1 + max(
            a.chunk for each in found.values() for mine in each.ranks for event in mine for a in event.slot
        )
        if traced != chunks:
            raise ConfigError(f"--times {text}: its trace has {traced} chunks, the planned pipeline has {chunks}")
        return measured_times(found.values())
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4) or not all(0 < number < math.inf for number in numbers):
        raise ConfigError(
            f"--times {text}: must be a run's folder with a trace, or seconds above 0 as F,I,W or F,I,W,F&B: of a "
            "chunk's forward pass, the input and the weight part of its backward pass, and of a pair that runs together"
        )
    F, inputs, weights = numbers[:3]
    together = numbers[3] / sum(numbers[:3]) if len(numbers) == 4 else 1.0
    return ChunkTimes.equal(chunks, F, inputs, weights, together)


def bubble_table(planned: Planned) -> str:
    """A table of the simulated bubble and activations, beside the formula of the schedule."""
    ranks, chunks, timeline = planned.pipeline.ranks, len(planned.pipeline.layers), planned.timeline
    name = FORMULA_OF[planned.pipeline.schedule]
    formula = published(planned)[name]
    live = [peak_chunks(events) * ranks / chunks for events in timeline.ranks]
    waits = timeline.idle_within if planned.pipeline.schedule == "zbv" else timeline.idle
    parts = {each.part.name: each for each in planned.step.step.exposed}
    rows = [
        ("bubble and communication", "simulated", f"{name}: {formula.words}"),
        ("span of a step", f"{timeline.span:.4g} s", ""),
        ("bubble of the rank that waits longest", f"{max(waits):.4g} s", f"{formula.bubble:.4g} s"),
        ("bubble share of all ranks", f"{timeline.bubble_share:.1%}", ""),
        ("  from each rank's first to its last action", f"{timeline.own_bubble_share:.1%}", ""),
        ("peak activations, in those of a P-th of the model", f"{max(live):g}", f"{formula.activations:g}"),
    ]
    for part in (EXCHANGE, TRANSFERS):
        if part in parts and planned.times is planned.step.times:
            rows.append((f"exposed: {part}", f"{parts[part].seconds:.4g} s", f"of {parts[part].part.seconds:.4g} s"))
    return table(rows)


def published(planned: Planned) -> dict[str, Any]:
    """The formulas, with the mean times of a P-th of the model."""
    ranks, chunks = planned.pipeline.ranks, len(planned.pipeline.layers)

    def mean(*kinds: str) -> float:
        return sum(planned.times(tuple(Action(kind, chunk, 0) for kind in kinds)) for chunk in range(chunks)) / ranks

    return formulas(ranks, mean("F"), mean("B"), mean("W"), mean("F", "B"), max(2, chunks // ranks))


def formula_table(planned: Planned) -> str:
    """A table of the published formulas of all schedules, for this model on this many ranks."""
    rows = [("by published formulas", "", "bubble", "activations", "parameters")]
    for name, each in published(planned).items():
        rows.append((name, each.words, f"{each.bubble:.4g} s", f"{each.activations:g}", f"{each.parameters} x"))
    return table(rows, left=(0, 1))


def rank_table(planned: Planned) -> str:
    """A table of each rank's layers, time and memory."""
    timeline, placement, count = planned.timeline, planned.pipeline.placement, len(planned.pipeline.layers)
    rows = [("rank", "layers of its chunks", "busy", "waits", "live chunks", "activations", "sum")]
    for rank, chunks in enumerate(placement):
        layers = " + ".join(str(planned.pipeline.layers[chunk]) for chunk in chunks)
        ends = [word for word, has in (("embedding", chunks[0] == 0), ("heads", chunks[-1] == count - 1)) if has]
        live = peak_chunks(timeline.ranks[rank])
        memory = planned.memory[rank]
        rows.append((
            str(rank), ", ".join([layers, *ends]), f"{timeline.busy(rank):.4g} s", f"{timeline.idle[rank]:.4g} s",
            f"{live:g}", si(memory.activations, "B"), si(memory.total, "B"),
        ))  # fmt: skip
    return table(rows, left=(0, 1))
