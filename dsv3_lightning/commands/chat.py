"""`dsv3 chat`: a conversation on the terminal, until the end of the input."""

import argparse
import io
import itertools
import sys
from pathlib import Path
from typing import Any

from dsv3_lightning.common.flags import context_argument, model_argument, sampling_arguments, weights_argument
from dsv3_lightning.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    model_argument(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    context_argument(parser)
    weights_argument(parser)
    sampling_arguments(parser)


def run(
    checkpoint: Path,
    system: str,
    context: int | None,
    weights: str,
    max_new_tokens: int,
    stop: list[str],
    seed: int,
    **sampling: Any,
) -> int:
    """Answers each input line; `/reset` starts a new conversation, Ctrl-D ends. sampling: the fields of Sampling.

    A turn that can't be answered prints a message. On a terminal the conversation continues without it; input from a
    file ends there, since the next lines refer to that turn. Raises ConfigError.
    """
    from dsv3_lightning.inference.chat import Chat
    from dsv3_lightning.inference.sampling import Sampling
    from dsv3_lightning.runs.models import load

    how = Sampling(**sampling)
    model, tokenizer = load(checkpoint, chat=True)
    talk = Chat(model, tokenizer, how, seed, system, context, weights)
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that check_encoding can report the line of a wrong byte
    for number in itertools.count(1):
        print("> " if terminal else "", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        try:
            check_encoding(line, number)
            if line.strip() == "/reset":
                talk.reset()
                note("the conversation starts over")
                continue
            for piece in talk.reply(line.rstrip("\r\n"), max_new_tokens, tuple(stop)):
                print(piece, end="", flush=True)
            print(flush=True)
        except ConfigError as error:
            if not terminal:
                raise
            note(str(error))
            continue
        if talk.dropped:
            turns = "turn was" if talk.dropped == 1 else f"{talk.dropped} turns were"
            note(f"the context of {talk.limit} tokens is full: the oldest {turns} dropped (/reset starts over)")
        if talk.cut:
            note(f"the context of {talk.limit} tokens is full: the answer ends here (/reset starts over)")
    return 0


def check_encoding(line: str, number: int) -> None:
    """Raises ConfigError for a byte invalid in the input's encoding, which Python decodes to a lone surrogate."""
    wrong = next((character for character in line if "\udc80" <= character <= "\udcff"), None)
    if wrong is not None:
        encoding = (getattr(sys.stdin, "encoding", None) or "utf-8").upper()
        raise ConfigError(
            f"standard input: line {number} is not {encoding} text (it has the byte 0x{ord(wrong) - 0xDC00:02x})"
        )


def note(text: str) -> None:
    print(f"dsv3: {text}", file=sys.stderr, flush=True)
