"""What `--gpus` adds to `dsv3 plan`: a rank's memory, what travels, a step by part, and the run's duration."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from dsv3_lightning.commands import plan_tables as tables
from dsv3_lightning.commands.plan_pipeline import PipelineFlags, Planned, pipeline_tables, pipeline_work, plan_pipeline
from dsv3_lightning.common.table import si
from dsv3_lightning.config.checks import mesh_strategy, number_of_devices
from dsv3_lightning.config.schema import Config
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.parallel.mesh import KINDS, MeshShape, StrategyConfig, mesh_shape
from dsv3_lightning.planning import contexts
from dsv3_lightning.planning.cluster import Batch, RankMemory, fitting_batch, rank_memory
from dsv3_lightning.planning.hardware import Hardware
from dsv3_lightning.planning.layout import SETTING, WHAT_IF, Layout, Work, now
from dsv3_lightning.planning.parts import WIDE
from dsv3_lightning.planning.pipeline.memory import pipeline_memory
from dsv3_lightning.planning.share import together
from dsv3_lightning.planning.step import Step, step

CROWDED = 1.5  # routed tokens of a rank with popular experts over the mean, before the router is balanced


@dataclass(frozen=True)
class ClusterFlags:
    """What is planned beside the settings. name: of the GPU. dry: whether to count the memory of one rank's step, too.

    sources: whether to list the coefficients. fp8: whether to plan what the report has in FP8, whatever compute.fp8 is.
    """

    name: str
    dry: bool = False
    sources: bool = False
    fp8: bool = False


@dataclass(frozen=True)
class RankPlan:
    """A rank's memory and a step, planned for other models and other work than the run's, too.

    layout: of the run; in a pipeline with the share of the busiest rank. pipeline: None without one.
    """

    layout: Layout
    memory: Callable[[ModelConfig, Work], RankMemory]
    step: Callable[[Layout], Step]
    pipeline: Planned | None = None


def cluster_tables(
    config: Config, gpus: int, hardware: Hardware, flags: ClusterFlags, pipeline: PipelineFlags
) -> list[str]:
    """The tables of the plan on this many GPUs.

    Raises ConfigError for a mesh or batch that doesn't divide, naming the nearest that do, and for sequences that are
    too long for a rank, naming the longest that fit.
    """
    strategy, chosen = strategy_of(config)
    if flags.dry and strategy.cpu_offload:
        raise ConfigError("--dry-run: strategy.cpu_offload=true can't be counted without a GPU; leave one of them out")
    if flags.dry and config.compute.fp8:
        raise ConfigError("--dry-run: compute.fp8=true can't be counted without a GPU; leave one of them out")
    gpu, model = hardware.gpu, config.model
    shape = mesh_shape(strategy, gpus, math.gcd(gpus, gpu.per_node), model)
    plan = rank_plan(config, strategy, shape, hardware, flags.fp8, pipeline.overlap)
    work, planned = plan.layout.work, plan.step(plan.layout)
    memory = plan.memory(model, work)
    needed = needed_by_length(model, plan)
    check_length(config, needed, gpu.memory)
    crowded = plan.memory(busier(model), work) if shape.ep > 1 else None
    found = [f"{gpus:,} {flags.name.upper()}, {strategy.kind}{chosen}: {shape}"]
    found.append(tables.memory_table(memory, (CROWDED, crowded) if crowded else None, gpu, work))
    found.append(tables.policy_table(model, plan.layout, plan.memory, plan.step, gpu))
    found.append(tables.length_table(needed, gpu.memory))
    if flags.dry:
        pipelined = plan.pipeline and (plan.pipeline.pipeline.layers, plan.pipeline.memory.index(memory))
        found.append(tables.dry_table(config, strategy, shape, work, memory, pipelined))
    found += [tables.traffic_table(model, hardware, plan.layout), tables.part_table(planned)]
    if plan.pipeline is not None:
        found += pipeline_tables(plan.pipeline, pipeline)
    found.append(tables.time_table(config, planned, gpus, gpu.peak_in(work.precision)))
    found.append(tables.day_table(config, planned, work, gpus, gpu, strategy))
    return [*found, tables.source_table(planned, hardware)] if flags.sources else found


def rank_plan(
    config: Config, strategy: StrategyConfig, shape: MeshShape, hardware: Hardware, fp8: bool, overlap: bool
) -> RankPlan:
    """The plan of a rank of this mesh, the fullest one in a pipeline. Raises ConfigError for a batch that doesn't
    divide."""
    model = config.model
    if strategy.pipeline_parallel == 1:
        layout = layout_of(config, shape, strategy, work_of(config, shape.ranks), hardware, fp8)
        return RankPlan(
            layout,
            lambda model, work: rank_memory(model, shape, strategy, work),
            lambda layout: step(model, hardware, layout),
        )
    work = pipeline_work(config, strategy, shape.data_ranks)
    layout = layout_of(config, shape, strategy, work, hardware, fp8)
    found = plan_pipeline(config, strategy, layout, hardware, overlap)
    shares, placement, timeline = found.step.shares, found.pipeline.placement, found.step.timeline

    def memory(model: ModelConfig, work: Work) -> RankMemory:
        every = pipeline_memory(model, shape, work, shares, placement, timeline)
        return max(every, key=lambda rank: rank.total)

    def seconds(layout: Layout) -> Step:
        return plan_pipeline(config, strategy, replace(layout, share=None), hardware, overlap).step.step

    busiest = together(shares[chunk] for chunk in placement[found.step.busiest])
    code = replace(layout.code, zero1=True)
    return RankPlan(replace(layout, share=busiest, code=code), memory, seconds, found)


def needed_by_length(model: ModelConfig, plan: RankPlan) -> Callable[[int], float]:
    """Bytes of a rank with one sample of a length per micro-batch, with checkpointing full."""
    full = replace(plan.layout.work, policy="full")
    return lambda length: plan.memory(model, replace(full, tokens=length, sequence_length=length)).total


def layout_of(
    config: Config, shape: MeshShape, strategy: StrategyConfig, work: Work, hardware: Hardware, fp8: bool = False
) -> Layout:
    """The layout of a run of this config, with the code as it is; fp8: or with all of the report's FP8.

    Raises ConfigError where FP8 can't be planned.
    """
    if fp8 and hardware.generation != "sm90":
        raise ConfigError("--fp8: is planned for Hopper alone; must be with --gpu h100, h200 or h800")
    if fp8 and (config.model.hidden_size < WIDE or work.precision == "32"):
        raise ConfigError(
            f"--fp8: model.hidden_size={config.model.hidden_size} in precision {work.precision}; must be at least "
            f"{WIDE} in bf16, since tiles cost more than narrow products gain"
        )
    if work.fp8 == "emulated":
        raise ConfigError(
            "compute.fp8=emulated: is for its numbers, and its time isn't planned; with --gpus it must be true or false"
        )
    if work.fp8 and hardware.generation != "sm90":
        raise ConfigError("compute.fp8=true: is for Hopper alone; use --gpu h100, h200 or h800, or compute.fp8=false")
    tiles = WHAT_IF if fp8 else SETTING if work.fp8 else None
    balanced = "imbalance.bias" if config.callbacks.get("expert_bias") else "imbalance.loss"
    spread = shape.ep > 1 and config.model.num_moe_layers
    code = replace(now(hardware.generation, shape), fp8=tiles)
    code = replace(code, attention=code.masked) if config.data.isolate_documents else code
    return Layout(shape, strategy, work, code, hardware.rate(balanced) if spread else 1.0)


def check_length(config: Config, needed: Callable[[int], float], memory: float) -> None:
    """Raises ConfigError if no checkpointing makes room for one sample where a shorter one would fit."""
    length = config.data.sequence_length
    if needed(length) <= memory:
        return
    if fits := contexts.longest(needed, memory):
        raise ConfigError(
            f"data.sequence_length={length}: one sample needs {si(needed(length), 'B')} on a rank, of "
            f"{si(memory, 'B')}, with checkpointing full; the longest that fits is {fits}, since a sequence isn't "
            "split over ranks"
        )


def strategy_of(config: Config) -> tuple[StrategyConfig, str]:
    """The config's strategy, or an assumed one that suits the model, and a note if it is assumed."""
    strategy = mesh_strategy(config.strategy)
    if strategy is not None:
        return strategy, ""
    if isinstance(config.strategy, dict) or config.strategy not in ("auto", "ddp"):
        raise ConfigError(f"strategy={config.strategy!r}: only {', '.join(KINDS)} can be planned for --gpus")
    return StrategyConfig(kind="fsdp2_ep"), f" (assumed, the config says {config.strategy})"


def work_of(config: Config, gpus: int) -> Work:
    """The work of one rank: the config's micro-batch, with the step split over these GPUs."""
    trainer, devices = config.trainer, number_of_devices(config.trainer)
    ranks = gpus if devices is None else devices * trainer["num_nodes"]
    samples = max(1, config.data.batch_size // (trainer["accumulate_grad_batches"] * ranks))
    precision = "bf16-mixed" if trainer["precision"] == "auto" else trainer["precision"]
    T = config.data.sequence_length
    check_step(config, samples, ranks, gpus)
    micro_batches = config.data.batch_size // (samples * gpus)
    policy, optimizer = config.compute.activation_checkpointing, config.optimizer
    return Work(samples * T, micro_batches, T, precision, policy, moment=optimizer.moment_bytes, kind=optimizer.kind,
                fp8=config.compute.fp8)  # fmt: skip


def check_step(config: Config, samples: int, known: int, gpus: int) -> None:
    """Raises ConfigError, naming settings that fit, if the step isn't made of whole micro-batches on these GPUs.

    known: the number of ranks that determines the config's micro-batch.
    """
    data, accumulate = config.data, config.trainer["accumulate_grad_batches"]
    ramp = (data.batch_ramp.start, data.batch_ramp.increment) if data.batch_ramp else None
    fits = data.batch_size % (accumulate * known) == 0 and not any(size % gpus or size % known for size in ramp or ())
    if accumulate * known % gpus == 0 and fits:
        return
    fit = fitting_batch(Batch(data.batch_size, accumulate, ramp), known, gpus)
    words = [f"data.batch_size={fit.size}", f"trainer.accumulate_grad_batches={fit.accumulate}"]
    if fit.ramp and fit.size > fit.ramp[0]:
        words += [f"data.batch_ramp.start={fit.ramp[0]}", f"data.batch_ramp.increment={fit.ramp[1]}"]
    raise ConfigError(
        f"data.batch_size={data.batch_size}: does not divide into micro-batches of {samples} samples on {gpus} ranks; "
        f"use {' '.join(words)}"
    )


def busier(model: ModelConfig) -> ModelConfig:
    """A model whose ranks each get as many routed tokens as a rank with popular experts gets in this one."""
    return replace(model, num_experts_per_tok=math.ceil(CROWDED * model.num_experts_per_tok))
