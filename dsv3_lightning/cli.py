"""The command line: a table of verbs, each a plain function in a file of its own. Help and errors import no torch.

A wrong setting prints one line on stderr and exits with code 2. `sys.argv` is never changed, because Lightning starts
the other ranks of a run with the same command line.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from dsv3_lightning import __version__
from dsv3_lightning.common.flags import Parser
from dsv3_lightning.common.output import output_is_full, reader_has_left
from dsv3_lightning.errors import ConfigError, RunStopped
from dsv3_lightning.parallel.launch import delay_other_ranks


class Verb(NamedTuple):
    """A verb. Its module has `arguments(parser)`, which declares the flags, and `run`, which takes them by name."""

    module: str
    summary: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0, 2 for a user error, 130 for Ctrl-C, 141 for `| head`."""
    try:
        if argv is None:
            read_names_as_utf8()
        code = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        delay_other_ranks(os.environ)
        print(f"dsv3: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except RunStopped as stopped:
        print(f"dsv3: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not reader_has_left():
            raise
        return 141
    except OSError as error:
        if not output_is_full(error):
            raise
        print(f"dsv3: error: standard output: can't be written ({error.strerror})", file=sys.stderr)
        return 2


def lightning_main() -> int:
    """Runs `lightning run FILE` as `dsv3 run FILE`; passes other verbs to lightning-sdk, whose script has this name."""
    words = sys.argv[1:]
    if words[:1] == ["run"] and words[1:2] not in (["job"], ["mmt"], ["model"]):
        return main()
    try:
        from lightning_sdk.cli.entrypoint import main_cli
    except ImportError:
        print("usage: lightning run FILE... [key=value ...]   (more: dsv3 --help)", file=sys.stderr)
        return 2
    return main_cli() or 0


def dispatch(words: Sequence[str]) -> int:
    top = Parser("dsv3", "Train DeepSeek-V3-style language models from one YAML file.", verb_list())
    top.add_argument("--version", action="version", version=f"dsv3-lightning {__version__}")
    top.add_argument("verb", choices=VERBS, metavar="VERB")
    top.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="...", help="dsv3 VERB --help shows the arguments of a verb"
    )
    if not words:
        top.print_help(sys.stderr)
        return 2
    chosen = top.parse_args(words)
    verb = VERBS[chosen.verb]
    module = importlib.import_module(verb.module)
    parser = Parser(f"dsv3 {chosen.verb}", verb.summary, "")
    module.arguments(parser)
    return module.run(**vars(parser.parse_intermixed_args(chosen.words)))


def read_names_as_utf8() -> None:
    """Restarts Python in UTF-8 mode if the locale uses ASCII for file names (LC_ALL=C without coercion)."""
    if os.name == "posix" and sys.getfilesystemencoding() not in ("utf-8", "utf8"):
        os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def verb_list() -> str:
    return "verbs:\n" + "\n".join(f"  {name:<11} {verb.summary}" for name, verb in VERBS.items())


VERBS = {
    "run": Verb("dsv3_lightning.commands.run", "Train, or continue training."),
    "validate": Verb("dsv3_lightning.commands.validate", "Check a configuration, and do nothing else."),
    "plan": Verb("dsv3_lightning.commands.plan", "Show parameters, FLOP, memory and a run's time, without a device."),
    "prepare": Verb("dsv3_lightning.commands.prepare", "Tokenize and pack a configuration's data."),
    "data": Verb("dsv3_lightning.commands.data", "Verify prepared data, or show what it holds."),
    "demo-corpus": Verb("dsv3_lightning.commands.demo_corpus", "Fetch a corpus of English, Chinese and code."),
    "generate": Verb("dsv3_lightning.commands.generate", "Continue a text with a trained model."),
    "chat": Verb("dsv3_lightning.commands.chat", "Talk with a trained model; /reset starts over."),
    "serve": Verb("dsv3_lightning.commands.serve", "Serve a trained model to OpenAI clients."),
    "sample": Verb("dsv3_lightning.commands.sample", "Sample answers, and write the right ones as tuning data."),
    "evaluate": Verb("dsv3_lightning.commands.evaluate", "Score a model on tasks with ranked or generated answers."),
    "eval": Verb("dsv3_lightning.commands.eval", "Fetch or generate tasks for evaluation and decontamination."),
    "export": Verb("dsv3_lightning.commands.export", "Write a run's model as a Hugging Face folder."),
    "import": Verb("dsv3_lightning.commands.import_folder", "Check a Hugging Face folder to start runs from."),
    "checkpoint": Verb("dsv3_lightning.commands.checkpoint", "Inspect, verify or consolidate a checkpoint."),
    "trace": Verb("dsv3_lightning.commands.trace", "Draw what each rank of a pipeline did in a run."),
    "placement": Verb("dsv3_lightning.commands.placement", "Place a model's experts on GPUs by their load."),
    "needle": Verb("dsv3_lightning.commands.needle", "Test whether a model finds a line in a long text."),
    "sweep": Verb("dsv3_lightning.studies.sweep", "Run an experiment: variants of a configuration, several seeds."),
    "compare": Verb("dsv3_lightning.studies.compare", "Compare finished runs in a table and plots."),
    "reproduce": Verb("dsv3_lightning.studies.reproduce", "Test which of the papers' claims hold here."),
    "doctor": Verb("dsv3_lightning.commands.doctor", "Show what this machine and installation can do."),
}
