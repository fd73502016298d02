"""The parser of flags, those that several verbs share, and the types of numeric flags. Imports no torch."""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from dsv3_lightning.common.paths import path_argument
from dsv3_lightning.errors import ConfigError

T = TypeVar("T", int, float)


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError for errors and accepts no abbreviated options."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def _print_message(self, message: str, file: Any = None) -> None:
        """Unlike argparse's own, it raises OSError where the message can't be written."""
        print(message, end="", file=file or sys.stderr, flush=True)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def model_argument(parser: argparse.ArgumentParser) -> None:
    help = "a run's folder (its best checkpoint), a checkpoint file, or a Hugging Face folder"
    parser.add_argument("checkpoint", type=path_argument, metavar="MODEL", help=help)


def run_argument(parser: argparse.ArgumentParser) -> None:
    help = "a run's folder (its best checkpoint), or a checkpoint file"
    parser.add_argument("run", type=path_argument, metavar="RUN", help=help)


def context_argument(parser: argparse.ArgumentParser) -> None:
    help = "maximum tokens per text; default: the model's context length"
    parser.add_argument("--context", type=positive, metavar="N", help=help)


def weights_argument(parser: argparse.ArgumentParser) -> None:
    help = "int8: experts, feed-forward networks and head in int8, for one text on a CPU; default %(default)s"
    parser.add_argument("--weights", choices=("fp32", "int8"), default="fp32", help=help)


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-new-tokens", type=not_negative, default=128, metavar="N", help="default %(default)s")
    add("--temperature", type=float, default=0.7, metavar="X", help="0 is greedy; default %(default)s")
    add("--top-k", type=int, default=0, metavar="N", help="sample from the N most likely tokens; 0: from all")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="sample from the most likely tokens with total probability X",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="X",
        help="sample from tokens at least X times as likely as the best",
    )
    help = "stop before this text; may be repeated; $'\\n' is a line end"
    add("--stop", action="append", default=[], metavar="TEXT", help=help)
    add("--seed", type=seed, default=1, metavar="N", help="random seed of sampling; default %(default)s")


def jobs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time; default %(default)s")


def positive(text: str) -> int:
    return number(int, text, lambda value: value >= 1, "a whole number of at least 1")


def seed(text: str) -> int:
    return number(int, text, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")


def not_negative(text: str) -> int:
    return number(int, text, lambda value: value >= 0, "a whole number of at least 0")


def port(text: str) -> int:
    return number(int, text, lambda value: 0 <= value < 2**16, "a whole number from 0 to 65535")


def above_zero(text: str) -> float:
    return number(float, text, lambda value: 0 < value < math.inf, "a number above 0")


def number(kind: Callable[[str], T], text: str, fits: Callable[[T], bool], valid: str) -> T:
    """Converts a flag's text to a number. Raises ArgumentTypeError with what is valid."""
    try:
        if fits(value := kind(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be {valid}")
