"""The tables of `dsv3 plan --gpus N`: each takes what was planned and says it in text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dsv3_lightning.common.table import si, table
from dsv3_lightning.config.schema import Config
from dsv3_lightning.data.batches.ramp import tokens_of
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.planning import contexts, day
from dsv3_lightning.planning.cluster import RankMemory
from dsv3_lightning.planning.coefficients import TABLE, unmeasured
from dsv3_lightning.planning.flops import forward_flop_per_token, training_flop_per_token
from dsv3_lightning.planning.hardware import GPU, Hardware
from dsv3_lightning.planning.layout import Layout, Work
from dsv3_lightning.planning.memory import checkpoint_bytes
from dsv3_lightning.planning.step import Step
from dsv3_lightning.planning.wires import traffic

PUBLISHED = 180e3  # H800 hours per trillion tokens, V3 §1 table 1


def memory_table(memory: RankMemory, crowded: tuple[float, RankMemory] | None, gpu: GPU, work: Work) -> str:
    """A table of a rank's memory. crowded: that of a rank with so many times its routed tokens."""
    exact = "exact, on the host" if memory.offloaded else "exact"
    return table(
        [
            (f"memory per rank, {work.precision}", "", ""),
            ("weights, its part", si(memory.weights, "B"), exact),
            ("gradients, its part", si(memory.gradients, "B"), exact),
            ("optimizer, its part", si(memory.optimizer, "B"), exact),
            ("gathered for a moment", si(memory.gathered, "B"), "estimate"),
            (f"activations of {work.tokens:,} tokens, checkpointing {work.policy}", si(memory.activations, "B"),
             "estimate"),
            *([("sum on the host", si(memory.kept, "B"), "")] if memory.offloaded else []),
            ("sum", si(memory.total, "B"), f"{verdict(memory, gpu)} in {si(gpu.memory, 'B')}"),
            *([(f"sum with {crowded[0]:g} times the routed tokens", si(crowded[1].total, "B"),
                verdict(crowded[1], gpu))] if crowded else []),
        ]
    )  # fmt: skip


def verdict(memory: RankMemory, gpu: GPU) -> str:
    return "fits" if memory.total < gpu.memory else "DOES NOT FIT"


def policy_table(
    model: ModelConfig, layout: Layout, memory: Callable[[ModelConfig, Work], RankMemory],
    step: Callable[[Layout], Step], gpu: GPU,
) -> str:  # fmt: skip
    """A table of the memory and the time of a step under each policy of compute.activation_checkpointing."""
    rows = [("by checkpointing policy", "activations", "sum", "", "step")]
    for policy in layout.code.again:
        other = replace(layout, work=replace(layout.work, policy=policy))
        held, seconds = memory(model, other.work), step(other).seconds
        rows.append((policy, si(held.activations, "B"), si(held.total, "B"), verdict(held, gpu), f"{seconds:.2f} s"))
    return table(rows)


def length_table(needed: Callable[[int], float], memory: float) -> str:
    """A table of the memory that one sample of a long context needs, and of the longest that fits."""
    rows = [("one sample per micro-batch, checkpointing full", "sum", "")]
    for length in contexts.LONG:
        fits = "fits" if needed(length) <= memory else "DOES NOT FIT"
        rows.append((f"{length:,} positions", si(needed(length), "B"), fits))
    longest = contexts.longest(needed, memory)
    return table([*rows, ("longest that fits", f"{longest:,}", "a sequence isn't split over ranks")])


def dry_table(
    config: Config, strategy: StrategyConfig, shape: MeshShape, work: Work, memory: RankMemory,
    pipeline: tuple[Sequence[int], int] | None = None,
) -> str:  # fmt: skip
    """A table of a step's memory, counted and planned. pipeline: the layers of its chunks, and which of its ranks."""
    from dsv3_lightning.training import dry_pipeline, dry_run  # the only imports of torch in this file

    how = work.tokens // work.sequence_length, work.sequence_length, work.precision, work.policy
    if pipeline is None:
        rank, counted = 0, dry_run.dry_run(config.model, config.optimizer, strategy, shape, *how)
    else:
        layers, rank = pipeline
        counted = dry_pipeline.dry_pipeline(config.model, config.optimizer, strategy, shape, layers, rank, *how)
    rows = [
        ("weights", counted.weights, memory.weights),
        ("gradients", counted.gradients, memory.gradients),
        ("optimizer", counted.optimizer, memory.optimizer),
        ("at the peak of a step", counted.peak, memory.total),
    ]
    head = (f"dry run of rank {rank * shape.data_ranks}, even loads", "counted", "planned")
    return table([head, *((name, si(was, "B"), f"{plan / was - 1:+.1%}") for name, was, plan in rows)])


def traffic_table(model: ModelConfig, hardware: Hardware, layout: Layout) -> str:
    moved, shape = traffic(model, hardware, layout), layout.mesh
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
        state=checkpoint_bytes(
            config.model, precision, True, config.optimizer.moment_bytes, averaged, config.optimizer.kind
        ),
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
