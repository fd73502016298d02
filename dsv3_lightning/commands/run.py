"""`dsv3 run`, also `lightning run`: trains, or continues training."""

import argparse
import os

from dsv3_lightning.commands import settings
from dsv3_lightning.config.start import check_start
from dsv3_lightning.parallel.launch import rank_of


def arguments(parser: argparse.ArgumentParser) -> None:
    settings.arguments(parser)


@settings.command
def run(given: settings.Settings) -> int:
    """Trains to the last step, or says that the run is already finished."""
    check_start(given.config)
    rank_of(given.config.trainer, os.environ)  # before Lightning is imported, which believes less of it than it reads
    from dsv3_lightning.runs.fit import fit

    return fit(*given)
