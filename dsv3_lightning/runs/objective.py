"""What a run optimizes: text, pairs of answers (`dpo`) or rewards (`grpo`), each with its module and its data."""

from typing import Any

from dsv3_lightning.config.schema import Config
from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.tuning.module import PairDataModule, PromptDataModule
from dsv3_lightning.hub.folder import WeightSource
from dsv3_lightning.training.dpo import DPOModule
from dsv3_lightning.training.grpo import GRPOModule
from dsv3_lightning.training.module import PretrainModule


def build_module(config: Config, source: WeightSource | None) -> PretrainModule:
    """source: what the weights start from, if anything."""
    arguments: dict[str, Any] = {
        "model": config.model, "optimizer": config.optimizer, "loss": config.loss, "compute": config.compute,
        "sequence_length": config.data.sequence_length, "max_steps": config.trainer["max_steps"],
        "seed": config.run.seed, "init_from": source,
    }  # fmt: skip
    if config.dpo is not None:
        return DPOModule(config.dpo, config.data.batch_size, **arguments)
    if config.grpo is not None:
        tuned = GRPOModule(config.grpo, config.data.batch_size, **arguments)
        tuned.rewards.check()
        return tuned
    return PretrainModule(**arguments)


def build_data(config: Config, module: PretrainModule, known: dict[str, Any] | None) -> TextDataModule:
    """known: the inputs that the run's data were made of, if it has begun."""
    trainer = config.trainer
    whole_steps = module.balance.needs_counts and trainer["accumulate_grad_batches"] > 1
    given = config.data, config.model.mtp_depth, trainer["max_steps"], whole_steps, trainer["limit_val_batches"], known
    if config.dpo is not None:
        return PairDataModule(*given)
    if config.grpo is not None:
        return PromptDataModule(config.grpo.max_new_tokens, *given)
    return TextDataModule(*given)
