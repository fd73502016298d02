"""`dsv3 plan`: computes a config's parameters, FLOP and memory; only --dry-run imports torch."""

import argparse
from collections.abc import Sequence
from typing import Any

from dsv3_lightning.commands import settings
from dsv3_lightning.commands.plan_cluster import ClusterFlags, cluster_tables
from dsv3_lightning.commands.plan_pipeline import PipelineFlags, with_pipeline
from dsv3_lightning.common.flags import above_zero, positive
from dsv3_lightning.common.paths import path_argument
from dsv3_lightning.common.schedules import SCHEDULES
from dsv3_lightning.common.table import si, table
from dsv3_lightning.config.checks import mesh_strategy, number_of_devices
from dsv3_lightning.config.schema import Config
from dsv3_lightning.data.batches.ramp import tokens_of
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.planning.flops import forward_flop_per_token, training_flop_per_token
from dsv3_lightning.planning.hardware import PLANNED, Hardware, gpu_named
from dsv3_lightning.planning.matrices import newton_schulz_flop
from dsv3_lightning.planning.memory import training_memory
from dsv3_lightning.planning.parameters import Count, add, count_parameters
from dsv3_lightning.planning.share import whole_share


def arguments(parser: argparse.ArgumentParser) -> None:
    settings.arguments(
        parser,
        "[--gpus N [--gpu KIND] [--inside X] [--between X] [--fp8] [--dry-run] [--sources]] "
        "[--pipeline-parallel P [--schedule NAME] [--micro-batches M] [--overlap] [--times X] [--png FILE]] ",
    )
    add = parser.add_argument
    add("--gpus", type=positive, metavar="N", help="plan one of N ranks, and the run's duration")
    add("--gpu", default="h100", metavar="KIND", help=f"{', '.join(PLANNED)}; default %(default)s")
    for name, where in (("inside", "within a node"), ("between", "between nodes")):
        help = f"measured rate into a GPU {where}, in each direction; default: a share of the data sheet's"
        add(f"--{name}", type=above_zero, metavar="GB/s", help=help)
    add(
        "--fp8",
        action="store_true",
        help="what if all products and the way to the experts were in FP8; compute.fp8 alone is what runs",
    )
    add("--dry-run", action="store_true", help="also count the memory of one rank's step, on meta tensors")
    add("--sources", action="store_true", help="also list the coefficients of the time, with their sources")
    strategy = "in place of strategy.{}"
    add("--pipeline-parallel", type=positive, metavar="P", help=strategy.format("pipeline_parallel"))
    names = ", ".join(SCHEDULES)
    add("--schedule", choices=list(SCHEDULES), metavar="NAME", help=f"{strategy.format('schedule')}: {names}")
    add("--micro-batches", type=positive, metavar="M", help=strategy.format("micro_batches"))
    add("--overlap", action="store_true", help="plan the exchange of dualpipev's pairs under the other's computing")
    help = "times of the chunks: F,I,W or F,I,W,F&B in seconds, or a run's folder with a trace; default: planned"
    add("--times", metavar="X", help=help)
    add("--png", type=path_argument, metavar="FILE", help="also draw the timeline as a figure")


@settings.command
def run(
    given: settings.Settings, gpus: int | None, gpu: str, inside: float | None, between: float | None, fp8: bool,
    dry_run: bool, sources: bool, **pipeline: Any,
) -> int:  # fmt: skip
    flags = PipelineFlags(**pipeline)
    config = with_pipeline(given.config, flags)
    strategy = mesh_strategy(config.strategy)
    if gpus is None and strategy is not None and strategy.pipeline_parallel > 1:
        gpus = pipeline_gpus(config, strategy.pipeline_parallel)
    for flag, wanted in (("--dry-run", dry_run), ("--sources", sources), ("--fp8", fp8)):
        if wanted and gpus is None:
            raise ConfigError(f"{flag}: needs the number of ranks; add --gpus N")
    tables = [parameter_table(config), flop_table(config)]
    if gpus is None:
        tables.append(memory_table(config))
    else:
        measured = [rate * 1e9 if rate else None for rate in (inside, between)]
        hardware = Hardware(gpu_named(gpu), *measured)
        tables += cluster_tables(config, gpus, hardware, ClusterFlags(gpu, dry_run, sources, fp8), flags)
    print("\n\n".join(tables))
    return 0


def pipeline_gpus(config: Config, ranks: int) -> int:
    """The GPUs that a pipeline is planned for without --gpus: the config's, or one for each of its ranks."""
    devices = number_of_devices(config.trainer)
    known = devices * config.trainer["num_nodes"] if devices else ranks
    return known if known % ranks == 0 else ranks


def parameter_table(config: Config) -> str:
    parameters = count_parameters(config.model)
    rows: list[Sequence[str]] = [("parameters", "total", "active per token")]
    rows += [counted(part, count) for part, count in parameters.main.items()]
    rows += [counted("main model", parameters.main_model)]
    if parameters.mtp:
        rows += [counted(f"MTP {part}", count) for part, count in parameters.mtp.items()]
        rows += [counted("MTP modules, which share embedding and head", parameters.mtp_modules)]
        rows += [counted("all", add(parameters.main | {"MTP": parameters.mtp_modules}))]
    rows += [("expert bias (buffers, fp32)", f"{parameters.bias_entries:,}")]
    return table(rows)


def counted(part: str, count: Count) -> tuple[str, str, str]:
    return part, f"{count.total:,}", f"{count.active:,}"


def flop_table(config: Config) -> str:
    T, steps = config.data.sequence_length, config.trainer["max_steps"]
    per_token = training_flop_per_token(config.model, T)
    main_model = 3 * forward_flop_per_token(config.model, T, with_mtp=False)
    tokens = tokens_of(config.data, steps)
    steps_of_muon = newton_schulz_flop(config.model, whole_share(config.model))
    muon = [("Newton-Schulz FLOP per optimizer step", si(steps_of_muon, "FLOP"))]
    return table(
        [
            ("compute", ""),
            (f"training FLOP per token, {T} positions", si(per_token, "FLOP")),
            ("  of which the main model", si(main_model, "FLOP")),
            (f"tokens in {steps:,} steps of {batch(config.data)} samples", si(tokens, "")),
            ("FLOP of the run", si(per_token * tokens, "FLOP")),
            *(muon if config.optimizer.kind == "muon" else []),
        ]
    )


def batch(data: DataConfig) -> str:
    return f"{data.batch_ramp.start:,} to {data.batch_size:,}" if data.batch_ramp else f"{data.batch_size:,}"


def memory_table(config: Config) -> str:
    """A table of the memory of one unsharded copy with the micro-batch of one rank."""
    trainer, policy = config.trainer, config.compute.activation_checkpointing
    devices = trainer["devices"]
    ranks = len(devices) if isinstance(devices, list) else devices if type(devices) is int and devices > 0 else 1
    samples = max(1, config.data.batch_size // (trainer["accumulate_grad_batches"] * ranks * trainer["num_nodes"]))
    precision = "32" if trainer["precision"] == "auto" else trainer["precision"]
    memory = training_memory(config.model, samples * config.data.sequence_length, precision, policy,
                             moment=config.optimizer.moment_bytes, kind=config.optimizer.kind,
                             fp8=config.compute.fp8)  # fmt: skip
    assumed = f"{precision} assumed for auto" if trainer["precision"] == "auto" else precision
    return table(
        [
            (f"memory per rank, unsharded, precision {assumed}", "", ""),
            ("weights", si(memory.weights, "B"), "exact"),
            ("gradients", si(memory.gradients, "B"), "exact"),
            ("optimizer", si(memory.optimizer, "B"), "exact"),
            (f"activations of {samples:,} samples, checkpointing {policy}", si(memory.activations, "B"), "estimate"),
            ("sum", si(memory.total, "B"), ""),
        ]
    )
