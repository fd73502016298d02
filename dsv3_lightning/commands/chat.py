"""`dsv3 chat`: a conversation on the terminal, until the end of the input."""

import argparse
import sys
from pathlib import Path
from typing import Any

from dsv3_lightning.common.flags import context_argument, model_argument, sampling_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    model_argument(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="what stands before the first turn")
    context_argument(parser)
    sampling_arguments(parser)


def run(
    checkpoint: Path,
    system: str,
    context: int | None,
    max_new_tokens: int,
    stop: list[str],
    seed: int,
    **sampling: Any,
) -> int:
    """Each line is a turn; Ctrl-D ends. sampling: the fields of Sampling."""
    from dsv3_lightning.inference.chat import Chat
    from dsv3_lightning.inference.sampling import Sampling
    from dsv3_lightning.runs.models import load

    how = Sampling(**sampling)
    model, tokenizer = load(checkpoint, chat=True)
    talk = Chat(model, tokenizer, how, seed, system, context)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        print(prompt, end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        for piece in talk.reply(line.rstrip("\r\n"), max_new_tokens, tuple(stop)):
            print(piece, end="", flush=True)
        print(flush=True)
