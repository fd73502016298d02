"""`dsv3 validate`: everything that can be wrong with a config, without touching data, weights or a device."""

from pathlib import Path
from typing import Any

from dsv3_lightning.config.checks import names_classes
from dsv3_lightning.config.schema import Config
from dsv3_lightning.planning.parameters import count_parameters


def run(config: Config, tree: dict[str, Any], files: list[Path]) -> int:
    if names_classes(config.trainer, config.strategy, config.callbacks):
        from dsv3_lightning.config.instantiate import check_objects  # imports torch

        check_objects(config)
    parameters = count_parameters(config.model)
    print(f"ok: {config.run.name}, {parameters.total:,} parameters, {parameters.active:,} active per token")
    return 0
