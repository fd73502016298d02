"""`dsv3 validate`: checks a config completely, without touching data, weights or a device."""

import argparse

from dsv3_lightning.commands import settings
from dsv3_lightning.planning.parameters import count_parameters


def arguments(parser: argparse.ArgumentParser) -> None:
    settings.arguments(parser)


def run(words: list[str], print_config: bool) -> int:
    given = settings.read(words, print_config)
    if given is None:
        return 0
    from dsv3_lightning.config.instantiate import check_objects

    config = given.config
    check_objects(config)
    parameters = count_parameters(config.model)
    print(f"ok: {config.run.name}, {parameters.total:,} parameters, {parameters.active:,} active per token")
    return 0
