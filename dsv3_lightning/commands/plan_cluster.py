"""What `--gpus` adds to `dsv3 plan`: a rank's memory, what travels, a step by part, and the run's duration."""

import math
from dataclasses import replace
from typing import Any

from dsv3_lightning.common.table import si, table
from dsv3_lightning.config.checks import mesh_strategy, number_of_devices
from dsv3_lightning.config.schema import Config
from dsv3_lightning.data.batches.ramp import tokens_of
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.parallel.mesh import KINDS, MeshShape, StrategyConfig, mesh_shape
from dsv3_lightning.planning import contexts, day
from dsv3_lightning.planning.cluster import Batch, RankMemory, fitting_batch, rank_memory
from dsv3_lightning.planning.coefficients import TABLE, unmeasured
from dsv3_lightning.planning.flops import forward_flop_per_token, training_flop_per_token
from dsv3_lightning.planning.hardware import GPU, Hardware
from dsv3_lightning.planning.layout import Layout, Work, now
from dsv3_lightning.planning.memory import checkpoint_bytes
from dsv3_lightning.planning.step import Step, step
from dsv3_lightning.planning.wires import traffic

CROWDED = 1.5  # routed tokens of a rank with popular experts over the mean, before the router is balanced
PUBLISHED = 180e3  # H800 hours per trillion tokens, V3 §1 table 1


def cluster_tables(config: Config, gpus: int, hardware: Hardware, name: str, dry: bool, sources: bool) -> list[str]:
    """The tables of the plan on this many GPUs. dry: whether to add the counted memory of one rank's step.
    sources: whether to list the coefficients.

    Raises ConfigError for a mesh or batch that doesn't divide, naming the nearest that do, and for sequences that are
    too long for a rank, naming the longest that fit.
    """
    strategy, chosen = strategy_of(config)
    if dry and strategy.cpu_offload:
        raise ConfigError("--dry-run: strategy.cpu_offload=true can't be counted without a GPU; leave one of them out")
    gpu = hardware.gpu
    shape = mesh_shape(strategy, gpus, math.gcd(gpus, gpu.per_node), config.model)
    work = work_of(config, gpus)
    memory = rank_memory(config.model, shape, strategy, work)
    check_length(config, shape, strategy, work, gpu)
    layout = layout_of(config, shape, strategy, work, hardware)
    planned = step(config.model, hardware, layout)
    head = f"{gpus:,} {name.upper()}, {strategy.kind}{chosen}: {shape}"
    crowded = rank_memory(busier(config.model), shape, strategy, work)
    tables = [head, memory_table(memory, crowded if shape.ep > 1 else None, gpu, work)]
    tables.append(policy_table(config, hardware, layout))
    tables.append(length_table(config, shape, strategy, work, gpu))
    if dry:
        tables.append(dry_table(config, strategy, shape, work, memory))
    tables += [traffic_table(config, hardware, layout), part_table(planned)]
    tables += [
        time_table(config, planned, gpus, gpu.peak_in(work.precision)),
        day_table(config, planned, work, gpus, gpu, strategy),
    ]
    return [*tables, source_table(planned, hardware)] if sources else tables


def layout_of(config: Config, shape: MeshShape, strategy: StrategyConfig, work: Work, hardware: Hardware) -> Layout:
    """The layout of a run of this config, with the code as it is."""
    balanced = "imbalance.bias" if config.callbacks.get("expert_bias") else "imbalance.loss"
    spread = shape.ep > 1 and config.model.num_moe_layers
    code = now(hardware.generation, shape)
    code = replace(code, attention=code.masked) if config.data.isolate_documents else code
    return Layout(shape, strategy, work, code, hardware.rate(balanced) if spread else 1.0)


def check_length(config: Config, shape: MeshShape, strategy: StrategyConfig, work: Work, gpu: GPU) -> None:
    """Raises ConfigError if no checkpointing makes room for one sample where a shorter one would fit."""
    full, length = replace(work, policy="full"), work.sequence_length
    needed = contexts.memory_of(config.model, shape, strategy, full, length)
    if needed <= gpu.memory:
        return
    if fits := contexts.longest(config.model, shape, strategy, full, gpu.memory):
        raise ConfigError(
            f"data.sequence_length={length}: one sample needs {si(needed, 'B')} on a rank, of {si(gpu.memory, 'B')}, "
            f"with checkpointing full; the longest that fits is {fits}, since a sequence isn't split over ranks"
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
    policy, moment = config.compute.activation_checkpointing, config.optimizer.moment_bytes
    return Work(samples * T, micro_batches, T, precision, policy, moment=moment)


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


def memory_table(memory: RankMemory, crowded: RankMemory | None, gpu: GPU, work: Work) -> str:
    """A table of a rank's memory. crowded: that of a rank with CROWDED times its routed tokens."""
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
            *([(f"sum with {CROWDED:g} times the routed tokens", si(crowded.total, "B"), verdict(crowded, gpu))]
              if crowded else []),
        ]
    )  # fmt: skip


def verdict(memory: RankMemory, gpu: GPU) -> str:
    return "fits" if memory.total < gpu.memory else "DOES NOT FIT"


def policy_table(config: Config, hardware: Hardware, layout: Layout) -> str:
    """A table of the memory and the time of a step under each policy of compute.activation_checkpointing."""
    rows = [("by checkpointing policy", "activations", "sum", "", "step")]
    for policy in layout.code.again:
        other = replace(layout, work=replace(layout.work, policy=policy))
        memory = rank_memory(config.model, other.mesh, other.strategy, other.work)
        seconds = step(config.model, hardware, other).seconds
        rows.append((policy, si(memory.activations, "B"), si(memory.total, "B"), verdict(memory, hardware.gpu),
                     f"{seconds:.2f} s"))  # fmt: skip
    return table(rows)


def length_table(config: Config, shape: MeshShape, strategy: StrategyConfig, work: Work, gpu: GPU) -> str:
    """A table of the memory that one sample of a long context needs, and of the longest that fits."""
    full = replace(work, policy="full")
    fits = contexts.longest(config.model, shape, strategy, full, gpu.memory)
    rows = [("one sample per micro-batch, checkpointing full", "sum", "")]
    for length in contexts.LONG:
        needed = contexts.memory_of(config.model, shape, strategy, full, length)
        rows.append((f"{length:,} positions", si(needed, "B"), "fits" if needed <= gpu.memory else "DOES NOT FIT"))
    return table([*rows, ("longest that fits", f"{fits:,}", "a sequence isn't split over ranks")])


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


def traffic_table(config: Config, hardware: Hardware, layout: Layout) -> str:
    moved, shape = traffic(config.model, hardware, layout), layout.mesh
    return table(
        [
            ("received by a rank per step", "bytes"),
            ("parameters gathered, gradients reduced", si(moved.parameters, "B")),
            (f"gradients between {shape.dp_replicate} replicas", si(moved.replicas, "B")),
            *([("parameters from the host, gradients to it", si(moved.host, "B"))] if moved.host else []),
            (f"tokens to {shape.ep} ranks of experts and back, within nodes", si(moved.tokens_inside, "B")),
            ("  and between nodes", si(moved.tokens_between, "B")),
        ]
    )


def part_table(planned: Step) -> str:
    """A table of the step by part: its seconds, those that it adds to the step, and their share."""
    rows = [("a step by part, slowest rank", "seconds", "exposed", "share")]
    for part, seconds in planned.exposed:
        shown = f"{seconds / planned.seconds:.1%}" if seconds else "hidden"
        rows.append((part.name, f"{part.seconds:.2f}", f"{seconds:.2f}", shown))
    rows.append(("step", "", f"{planned.seconds:.2f}", "100.0%"))
    used = planned.coefficients
    guessed = sum(TABLE[name].source.startswith("estimate") for name in used)
    note = f"from {len(used)} coefficients, {guessed} of them estimates (--sources lists them)"
    if left := unmeasured(used):
        note += f"; not measured on a GPU: {'all' if len(left) == len(used) else len(left)}"
    return table(rows) + "\n" + note


def time_table(config: Config, planned: Step, gpus: int, peak: float) -> str:
    total = tokens_of(config.data, config.trainer["max_steps"])
    speed = planned.tokens_per_second * gpus
    hours = gpus * total / speed / 3600  # the smaller steps of a batch that grows, at the speed of the full ones
    rows = [
        ("time", ""),
        ("step", f"{planned.seconds:.2f} s"),
        (f"MFU, of {si(peak, 'FLOP/s')}", f"{planned.flop / planned.seconds / peak:.1%}"),
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


def schedule_of(config: Config, seconds: float, sharded: bool, precision: str) -> day.Schedule:
    """What interrupts a run of this config. seconds: the time of a step. sharded: whether checkpoints
    are sharded.

    A share in trainer.limit_val_batches is of the held-out documents, which are `data.validation_fraction` of the run's
    tokens if these are seen once.
    """
    data, trainer = config.data, config.trainer
    limit, batch = trainer["limit_val_batches"], data.batch_size * data.sequence_length
    held_out = data.validation_fraction * tokens_of(data, trainer["max_steps"]) / batch
    batches = min(limit, held_out) if isinstance(limit, int) else limit * held_out
    settings: dict[str, Any] = config.callbacks.get("checkpoint") or {}
    minutes, steps = settings.get("every_n_minutes"), settings.get("every_n_steps")
    clock = math.ceil(60 * minutes / seconds) if minutes else math.inf  # in steps: the first that is late enough
    every = min(clock, steps or math.inf, trainer["max_steps"])
    averaged = config.callbacks.get("weight_average") is not None
    return day.Schedule(
        validate_every=trainer["val_check_interval"] * seconds,
        batches=batches,
        save_every=every * seconds,
        state=checkpoint_bytes(config.model, precision, True, config.optimizer.moment_bytes, averaged),
        kept=(settings.get("keep") or 0) + (settings.get("keep_best") or 0),
        sharded=sharded,
    )


def day_table(config: Config, planned: Step, work: Work, gpus: int, gpu: GPU, strategy: StrategyConfig) -> str:
    """A table of the time in a day that isn't training, with a warning for each cause that takes more than 2 %."""
    schedule = schedule_of(config, planned.seconds, strategy.sharded_checkpoints, work.precision)
    found = day.losses(schedule, planned.seconds, gpus, gpu.per_node)
    rows = [("of a day", "share", "each takes", "every")]
    rows += [(loss.name, f"{loss.share:.2%}", duration(loss.seconds), duration(loss.every)) for loss in found]
    rows.append((f"a checkpoint, of which {schedule.kept} are kept", si(schedule.state, "B"),
                 si(schedule.kept * schedule.state, "B"), ""))  # fmt: skip
    return "\n".join([table(rows), *day.warnings(found, schedule, gpus, gpu.per_node)])


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def source_table(planned: Step, hardware: Hardware) -> str:
    """A table of the coefficients of the step and of the day: value, unit, whether it was measured, source."""
    rows = [("coefficient", "value", "unit", "measured", "source")]
    for name in (*planned.coefficients, *day.COEFFICIENTS):
        entry = TABLE[name]
        measured = "yes" if entry.measured else "no"
        rows.append((name, f"{hardware.rate(name):.4g}", entry.unit, measured, entry.source))
    return table(rows, left=(0, 2, 3, 4))
