"""What must fit together for preference and reinforcement learning. Imports no torch."""

from typing import Any

from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.balance_table import BALANCE_LOSSES
from dsv3_lightning.training.config import LossConfig
from dsv3_lightning.training.tuning import DPOConfig, GRPOConfig

# Callbacks that repeat the language-model loss, or return to an earlier one of its values. The router probe reads
# validation batches, which have no answers before they are sampled.
TEXT_ONLY = ("weight_average", "loss_spike")


def check_tuning(
    dpo: DPOConfig | None, grpo: GRPOConfig | None, data: DataConfig, loss: LossConfig, callbacks: dict[str, Any],
    pipelined: bool,
) -> None:  # fmt: skip
    """Raises ConfigError where a run with a `dpo` or `grpo` section has settings that mean nothing in it."""
    if dpo is not None and grpo is not None:
        raise ConfigError("dpo and grpo are both given; a run has one of them")
    name = "dpo" if dpo is not None else "grpo" if grpo is not None else None
    if name is None:
        return
    if pipelined:
        raise ConfigError(f"{name}: layers in a pipeline aren't supported; set strategy.pipeline_parallel to 1")
    if data.tokenizer is None:
        raise ConfigError(f"{name}: needs a tokenizer; set init_from to the model that is tuned, or data.tokenizer")
    for key, value in (("sources", data.sources), ("batch_ramp", data.batch_ramp)):
        if value is not None:
            raise ConfigError(
                f"data.{key}: {name} reads the lines of data.paths in batches of one size; set it to null"
            )
    whole = [one for one in loss.balance_factors if BALANCE_LOSSES[one].whole_batch]
    if whole:
        raise ConfigError(
            f"loss.balance={whole[0]}: {name} has the balance losses of sequences alone; use sequence or none"
        )
    for key in (*TEXT_ONLY, *(("router_probe",) if grpo is not None else ())):
        if callbacks.get(key) is not None:
            raise ConfigError(f"callbacks.{key}: is about text of the data, which {name} replaces; set it to null")
    if grpo is not None and grpo.max_new_tokens > data.sequence_length:
        raise ConfigError(
            f"grpo.max_new_tokens={grpo.max_new_tokens}: with a prompt it needs a data.sequence_length above "
            f"{data.sequence_length}"
        )
