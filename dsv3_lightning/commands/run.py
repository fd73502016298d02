"""`dsv3 run`, also `lightning run`: trains, or continues training."""

import argparse

from dsv3_lightning.commands import settings
from dsv3_lightning.config.start import check_start


def arguments(parser: argparse.ArgumentParser) -> None:
    settings.arguments(parser)


def run(words: list[str], print_config: bool) -> int:
    """Trains to the last step, or says that this is done."""
    given = settings.read(words, print_config)
    if given is None:
        return 0
    check_start(given.config)
    from dsv3_lightning.runs.fit import fit

    return fit(*given)
