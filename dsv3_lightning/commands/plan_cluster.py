"""What `--gpus` adds to `dsv3 plan`: the memory of one rank, the communication, and the run's duration."""

import math
from dataclasses import replace

from dsv3_lightning.common.table import si, table
from dsv3_lightning.config.checks import mesh_strategy, number_of_devices
from dsv3_lightning.config.schema import Config
from dsv3_lightning.data.batches.ramp import tokens_of
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.mesh import KINDS, MeshShape, StrategyConfig, mesh_shape
from dsv3_lightning.planning.cluster import (
    RECOMPUTED,
    Batch,
    RankMemory,
    StepTime,
    Work,
    fitting_batch,
    rank_memory,
    step_time,
)
from dsv3_lightning.planning.flops import forward_flop_per_token, training_flop_per_token
from dsv3_lightning.planning.hardware import GPU

PUBLISHED = 180e3  # H800 hours per trillion tokens, V3 §1 table 1


def cluster_tables(config: Config, gpus: int, gpu: GPU, gpu_name: str, efficiency: float, dry: bool) -> list[str]:
    """The tables of the plan on this many GPUs. dry: whether to add the counted memory of one rank's step.

    Raises ConfigError for a mesh or batch that doesn't divide, naming the nearest that do.
    """
    strategy, chosen = strategy_of(config)
    if dry and strategy.cpu_offload:
        raise ConfigError("--dry-run: strategy.cpu_offload=true can't be counted without a GPU; leave one of them out")
    shape = mesh_shape(strategy, gpus, math.gcd(gpus, gpu.per_node), config.model)
    work = work_of(config, gpus)
    memory = rank_memory(config.model, shape, strategy, work)
    time = step_time(config.model, shape, strategy, work, gpu, efficiency)
    head = f"{gpus:,} {gpu_name.upper()}, {strategy.kind}{chosen}: {shape}"
    tables = [head, memory_table(memory, gpu, work)]
    tables.append(policy_table(config, shape, strategy, work, gpu, efficiency))
    if dry:
        tables.append(dry_table(config, strategy, shape, work, memory))
    times = time_table(config, time, gpus, gpu.peak_in(work.precision), efficiency)
    return [*tables, traffic_table(time, shape), times]


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
    return Work(samples * T, micro_batches, T, precision, config.compute.activation_checkpointing)


def check_step(config: Config, samples: int, known: int, gpus: int) -> None:
    """Raises ConfigError, naming settings that fit, if the step isn't made of whole micro-batches on these GPUs.

    known: the number of ranks that determines the config's micro-batch.
    """
    data, accumulate = config.data, config.trainer["accumulate_grad_batches"]
    sizes = [data.batch_size, *([data.batch_ramp.start, data.batch_ramp.increment] if data.batch_ramp else [])]
    if accumulate * known % gpus == 0 and not any(size % (accumulate * known) for size in sizes):
        return
    ramp = (data.batch_ramp.start, data.batch_ramp.increment) if data.batch_ramp else None
    fit = fitting_batch(Batch(data.batch_size, accumulate, ramp), known, gpus)
    words = [f"data.batch_size={fit.size}", f"trainer.accumulate_grad_batches={fit.accumulate}"]
    if fit.ramp and fit.size > fit.ramp[0]:
        words += [f"data.batch_ramp.start={fit.ramp[0]}", f"data.batch_ramp.increment={fit.ramp[1]}"]
    raise ConfigError(
        f"data.batch_size={data.batch_size}: does not divide into micro-batches of {samples} samples on {gpus} ranks; "
        f"use {' '.join(words)}"
    )


def memory_table(memory: RankMemory, gpu: GPU, work: Work) -> str:
    exact = "exact, on the host" if memory.offloaded else "exact"
    return table(
        [
            (f"memory per rank, {work.precision}", "", ""),
            ("weights, its part", si(memory.weights, "B"), exact),
            ("gradients, its part", si(memory.gradients, "B"), exact),
            ("AdamW, its part", si(memory.optimizer, "B"), exact),
            ("gathered for a moment", si(memory.gathered, "B"), "estimate"),
            (f"activations of {work.tokens:,} tokens, checkpointing {work.policy}", si(memory.activations, "B"),
             "estimate"),
            *([("sum on the host", si(memory.kept, "B"), "")] if memory.offloaded else []),
            ("sum", si(memory.total, "B"), f"{verdict(memory, gpu)} in {si(gpu.memory, 'B')}"),
        ]
    )  # fmt: skip


def verdict(memory: RankMemory, gpu: GPU) -> str:
    return "fits" if memory.total < gpu.memory else "DOES NOT FIT"


def policy_table(
    config: Config, shape: MeshShape, strategy: StrategyConfig, work: Work, gpu: GPU, efficiency: float
) -> str:
    """A table of the memory and the recomputation of each policy of compute.activation_checkpointing."""
    rows = [("by checkpointing policy", "activations", "sum", "", "computing")]
    for policy in RECOMPUTED:
        other = replace(work, policy=policy)
        memory = rank_memory(config.model, shape, strategy, other)
        seconds = step_time(config.model, shape, strategy, other, gpu, efficiency).compute
        rows.append((policy, si(memory.activations, "B"), si(memory.total, "B"), verdict(memory, gpu),
                     f"{seconds:.2f} s"))  # fmt: skip
    return table(rows)


def dry_table(config: Config, strategy: StrategyConfig, shape: MeshShape, work: Work, memory: RankMemory) -> str:
    from dsv3_lightning.training.dry_run import dry_run  # the only import of torch in this file

    samples = work.tokens // work.sequence_length
    counted = dry_run(
        config.model, config.optimizer, strategy, shape, samples, work.sequence_length, work.precision, work.policy
    )
    rows = [
        ("weights", counted.weights, memory.weights),
        ("gradients", counted.gradients, memory.gradients),
        ("AdamW", counted.optimizer, memory.optimizer),
        ("at the peak of a step", counted.peak, memory.total),
    ]
    head = ("dry run of rank 0, even loads", "counted", "planned")
    return table([head, *((name, si(was, "B"), f"{plan / was - 1:+.1%}") for name, was, plan in rows)])


def traffic_table(time: StepTime, shape: MeshShape) -> str:
    traffic = time.traffic
    return table(
        [
            ("received by a rank per step", "bytes", "seconds"),
            ("parameters gathered, gradients scattered", si(traffic.parameters, "B"), ""),
            (f"gradients between {shape.dp_replicate} replicas", si(traffic.replicas, "B"), ""),
            ("  both, while it computes", "", f"{traffic.parameter_seconds:.2f}"),
            *([("parameters from the host, gradients to it, while it computes", si(traffic.host, "B"),
                f"{traffic.host_seconds:.2f}")] if traffic.host else []),
            (f"tokens to {shape.ep} ranks of experts and back", si(traffic.tokens, "B"),
             f"{traffic.token_seconds:.2f}"),
        ]
    )  # fmt: skip


def time_table(config: Config, time: StepTime, gpus: int, peak: float, efficiency: float) -> str:
    step_tokens = config.data.batch_size * config.data.sequence_length
    total = tokens_of(config.data, config.trainer["max_steps"])
    speed = step_tokens / time.seconds
    hours = gpus * total / speed / 3600  # the smaller steps of a batch that grows, at the speed of the full ones
    rows = [
        ("time", ""),
        (f"computing, at {efficiency:.0%} of the peak (assumed)", f"{time.compute:.2f} s"),
        ("step", f"{time.seconds:.2f} s"),
        (f"MFU, of {si(peak, 'FLOP/s')}", f"{time.flop / time.seconds / peak:.1%}"),
        ("tokens per second and GPU", f"{speed / gpus:,.0f}"),
        ("tokens per day", si(speed * 86400, "")),
        ("GPU hours per trillion tokens", f"{hours / total * 1e12:,.0f}"),
        (f"GPU hours of the run, {si(total, '')} tokens", f"{hours:,.0f}"),
        ("days of the run", f"{hours / gpus / 24:,.1f}"),
    ]
    if config.model.hidden_size == 7168 and config.model.n_routed_experts == 256:
        with_mtp = training_flop_per_token(config.model, config.data.sequence_length)
        main_model = 3 * forward_flop_per_token(config.model, config.data.sequence_length, with_mtp=False)
        reached = [si(flop * 1e12 / (PUBLISHED * 3600), "FLOP/s") for flop in (main_model, with_mtp)]
        rows.append(("published for V3 (H800, FP8, 16-way pipeline): GPU hours per T tokens", f"{PUBLISHED:,.0f}"))
        rows.append(("  which is per GPU, without and with MTP", " and ".join(reached)))
    return table(rows)
