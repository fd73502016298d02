"""What is needed to build a module from a checkpoint alone."""

from typing import Any

from dsv3_lightning.common.typed import build
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.parallel.checkpoints.opened import OpenCheckpoint
from dsv3_lightning.training.config import ComputeConfig, LossConfig, OptimizerConfig

SECTIONS = {"model": ModelConfig, "optimizer": OptimizerConfig, "loss": LossConfig, "compute": ComputeConfig}


def stored_arguments(checkpoint: OpenCheckpoint) -> dict[str, Any]:
    """PretrainModule's arguments, which follow from the settings in the checkpoint. Raises ConfigError."""
    settings = checkpoint.settings
    try:
        arguments: dict[str, Any] = {name: build(kind, settings[name], name) for name, kind in SECTIONS.items()}
        arguments["sequence_length"] = settings["data"]["sequence_length"]
        arguments["max_steps"] = settings["trainer"]["max_steps"]
        arguments["seed"] = settings["run"]["seed"]
    except (KeyError, ConfigError) as error:
        raise ConfigError(f"{checkpoint.path}: its settings are not those of this version ({error})") from error
    return arguments
