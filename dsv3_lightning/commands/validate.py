"""`dsv3 validate`: checks a config completely, without touching data, weights or a device."""

import argparse

from dsv3_lightning.commands import settings
from dsv3_lightning.config.checks import names_classes
from dsv3_lightning.config.start import check_start
from dsv3_lightning.planning.parameters import count_parameters


def arguments(parser: argparse.ArgumentParser) -> None:
    settings.arguments(parser)


@settings.command
def run(given: settings.Settings) -> int:
    config = given.config
    check_start(config)
    if names_classes(config.trainer, config.strategy, config.callbacks):
        from dsv3_lightning.config.instantiate import check_objects  # imports torch

        check_objects(config)
    parameters = count_parameters(config.model)
    print(f"ok: {config.run.name}, {parameters.total:,} parameters, {parameters.active:,} active per token")
    return 0
