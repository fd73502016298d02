"""What a pipeline must fulfill together with the model, the batch and the Trainer. Imports no torch."""

from typing import Any

from dsv3_lightning.data.batches.ramp import micro_batches
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.parallel.mesh import StrategyConfig
from dsv3_lightning.parallel.pipeline.checks import check_micro_batches, micro_batches_of
from dsv3_lightning.training.stages import chunk_layers


def check_pipeline(
    strategy: StrategyConfig, model: ModelConfig, data: DataConfig, trainer: dict[str, Any], ranks: int | None
) -> None:
    """Raises ConfigError, with the nearest that works. ranks: None if their number depends on the machine."""
    chunk_layers(strategy, model, data.sequence_length)
    if (accumulate := trainer["accumulate_grad_batches"]) > 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={accumulate}: a pipeline's micro-batches are strategy.micro_batches="
            f"{strategy.micro_batches}; set accumulate_grad_batches to 1"
        )
    if ranks is not None and ranks % strategy.pipeline_parallel == 0:
        check_batches(strategy, data, ranks // strategy.pipeline_parallel)


def check_batches(strategy: StrategyConfig, data: DataConfig, data_ranks: int) -> None:
    """Every step must divide into equal micro-batches, of a number that the schedule takes."""
    number, stages, size = micro_batches_of(strategy), strategy.pipeline_parallel, data.batch_size
    parts = number * data_ranks
    if size % parts:
        below, above = size // parts * parts, (size // parts + 1) * parts
        raise ConfigError(
            f"data.batch_size={size}: does not divide into micro_batches={number} × {data_ranks} data-parallel ranks = "
            f"{parts} equal parts; use {f'{below} or ' if below else ''}{above}"
        )
    if (ramp := data.batch_ramp) is None:
        return
    for step in range(ramp.start, size, ramp.increment):
        if step % data_ranks:
            raise ConfigError(
                f"data.batch_ramp: a step of {step} samples does not divide into {data_ranks} data-parallel ranks; its "
                f"start and increment need multiples of {data_ranks}"
            )
        found = micro_batches(step // data_ranks, size // parts)
        key = f"data.batch_ramp: micro-batches of a step of {step} samples"
        check_micro_batches(key, found, strategy.schedule, stages)
