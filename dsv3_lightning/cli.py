"""The command line: a table of verbs, each a plain function elsewhere. Help and mistakes import no torch.

A wrong setting is one line on stderr and exit code 2. `sys.argv` is never touched: Lightning starts the other ranks of
a run by the same command line.
"""

import argparse
import importlib
import math
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

from dsv3_lightning import __version__
from dsv3_lightning.common.paths import path_argument
from dsv3_lightning.errors import ConfigError, RunStopped

T = TypeVar("T", int, float)


class Verb(NamedTuple):
    """target: `module:function`. arguments: adds the verb's own to its parser."""

    target: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code: 0, 2 for a mistake of the user's, 130 for Ctrl-C, 141 for `| head`."""
    try:
        if argv is None:
            read_names_as_utf8()
        code = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except ConfigError as error:
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


def reader_has_left() -> bool:
    """Whether nobody reads our output any more; what is still to be written then goes nowhere."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def lightning_main() -> int:
    """`lightning run FILE` is `dsv3 run FILE`; other words are for lightning-sdk, whose script has the same name."""
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
    top.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="dsv3 VERB --help tells what a verb takes")
    if not words:
        top.print_help(sys.stderr)
        return 2
    chosen = top.parse_args(words)
    verb = VERBS[chosen.verb]
    parser = Parser(f"dsv3 {chosen.verb}", verb.summary, "")
    verb.arguments(parser)
    arguments = vars(parser.parse_intermixed_args(chosen.words))
    if verb.arguments in (config_arguments, plan_arguments):
        return run_with_config(verb, **arguments)
    return resolve(verb.target)(**arguments)


def run_with_config(verb: Verb, words: list[str], print_config: bool, **options: Any) -> int:
    """Composes and checks the settings, then hands them to the verb: (config, tree as plain dict, files read, ...)."""
    from dsv3_lightning.config.compose import compose, to_yaml
    from dsv3_lightning.config.overrides import split_words
    from dsv3_lightning.config.schema import check, to_tree
    from dsv3_lightning.config.start import check_start

    files, overrides = split_words(words)
    if not files:
        raise ConfigError("no config named; give a file or a preset, such as laptop")
    composed = compose(files, overrides)
    config = check(composed.tree, mesh=options.get("gpus") is None)
    if not print_config and verb in (VERBS["run"], VERBS["validate"]):
        check_start(config)
    if print_config:
        print(to_yaml(to_tree(config)), end="")
        return 0
    return resolve(verb.target)(config, to_tree(config), composed.files, **options)


def resolve(target: str) -> Callable[..., int]:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def read_names_as_utf8() -> None:
    """Starts Python again in UTF-8 mode where the locale would have file names in ASCII (LC_ALL=C without coercion)."""
    if os.name == "posix" and sys.getfilesystemencoding() not in ("utf-8", "utf8"):
        os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


class Parser(argparse.ArgumentParser):
    """Mistakes are ConfigErrors, and options are written out."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def config_arguments(parser: argparse.ArgumentParser) -> None:
    from dsv3_lightning.config.compose import PRESETS, presets

    parser.usage = f"{parser.prog} FILE... [key=value ...] [--print-config]"
    names = ", ".join(presets())
    parser.add_argument("words", nargs="+", metavar="FILE", help=f"YAML files, or presets by name: {names}")
    parser.add_argument("--print-config", action="store_true", help="show all settings in force, and do nothing")
    parser.epilog = CONFIG_HELP.format(prog=parser.prog, base=PRESETS / "base.yaml")


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    options = "[--gpus N [--gpu KIND] [--inside X] [--between X] [--efficiency X] [--dry-run]] [--print-config]"
    parser.usage = f"{parser.prog} FILE... [key=value ...] {options}"
    parser.add_argument("--gpus", type=positive, metavar="N", help="plan one rank of N, and the whole run's time")
    parser.add_argument(
        "--gpu", default="h100", metavar="KIND", help="a100, h100, h200, h800, b200; default %(default)s"
    )
    for name, where in (("inside", "within a node"), ("between", "between nodes")):
        parser.add_argument(
            f"--{name}", type=above_zero, metavar="GB/s",
            help=f"into a GPU {where}, in each direction; default: the data sheet's",
        )  # fmt: skip
    parser.add_argument(
        "--efficiency", type=share, default=0.45, metavar="X",
        help="share of the peak that computing alone is assumed to reach; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="also count what a rank's step holds, without numbers")


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=path_argument, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="what to continue; may be repeated"
    )
    parser.add_argument(
        "--draft", type=int, default=0, metavar="N", help="let N of the model's MTP modules guess ahead; the text stays"
    )
    sampling_arguments(parser)


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=path_argument, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--system", default="", metavar="TEXT", help="what stands before the first turn")
    context_argument(parser)
    sampling_arguments(parser)


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=path_argument, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--name", metavar="TEXT", help="what clients call the model; default: the folder's name")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default %(default)s")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="0: any; default %(default)s")
    parser.add_argument("--slots", type=int, default=16, metavar="N", help="texts at a time; default %(default)s")
    context_argument(parser)
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N", help="beyond them; default %(default)s")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="of a text; default %(default)s"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of the CPU; default: as torch chooses")


def context_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=positive, metavar="N", help="tokens of a text at most; default: the model's")


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=not_negative, default=128, metavar="N", help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="X", help="0 is greedy; default %(default)s")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="draw from the N likeliest; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="from the likeliest that sum to X")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="from those X times as likely as the best"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before it; may be repeated; $'\\n' is a line's end",
    )
    parser.add_argument("--seed", type=seed, default=1, metavar="N", help="of the sampling; default %(default)s")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="a run's folder (its best checkpoint), or a checkpoint file"
    )
    parser.add_argument("out", type=path_argument, metavar="OUT", help="the folder to make")
    types = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=types, default="float32", help="of the weights; default %(default)s")
    parser.add_argument(
        "--verify", type=path_argument, nargs="?", const=True, default=False, metavar="TOKENS.npy",
        help="write the model's logits to verify/ beside OUT, read OUT back and compare; of these, or random tokens",
    )  # fmt: skip
    parser.add_argument(
        "--file-gigabytes", type=above_zero, default=5.0, metavar="X", help="largest file; default %(default)s"
    )


def import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=path_argument, metavar="HF_FOLDER", help="with config.json and safetensors files"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="the YAML to write; default: the folder's name, here"
    )


def placement_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="a run's folder (its best checkpoint), or a checkpoint file"
    )
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="GPUs that serve it, of all nodes")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="default %(default)s")
    parser.add_argument("--replicas", type=positive, metavar="N", help="experts of a layer on all GPUs together")
    parser.add_argument(
        "--loads",
        type=path_argument,
        metavar="FILE.npy",
        help="tokens [layers, experts]; default: counted on validation text",
    )
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help="default: placement/ in the run's folder")


def needle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="a run's folder (its best checkpoint), or a checkpoint file"
    )
    parser.add_argument(
        "--lengths", type=positive, nargs="+", metavar="N", help="default: 1/4, 1/2, all of the context"
    )
    parser.add_argument("--depths", type=positive, default=5, metavar="N", help="of the needle; default %(default)s")
    parser.add_argument("--texts", type=positive, default=8, metavar="N", help="for each; default %(default)s")
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help="default: needle/ in the run's folder")


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="EXPERIMENT", help="a file, or one of ours; then key=value for all")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time; default %(default)s")
    parser.add_argument("--task", type=int, metavar="N", help="only the run of that number, from 0")
    parser.add_argument("--slurm", action="store_true", help="print a SLURM batch script, and do nothing")


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=path_argument, nargs="+", metavar="RUN", help="folders of runs, or of experiments")
    parser.add_argument("--markdown", type=path_argument, metavar="FILE", help="write the table there, too")
    parser.add_argument("--plot", type=path_argument, metavar="FILE", help="draw the curves there, as PNG")


def checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("inspect", "verify", "consolidate"), help="consolidate makes one file of it")
    parser.add_argument("path", type=path_argument, metavar="CKPT", help="a file, or a folder of shards")
    parser.add_argument(
        "output", type=path_argument, metavar="FILE", nargs="?", help="of consolidate: the file to write"
    )


def reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    parser.add_argument(
        "--dir",
        type=path_argument,
        dest="folder",
        default="runs/reproduce",
        metavar="FOLDER",
        help="default %(default)s",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="the report; default: reproduction.md in that folder"
    )
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="30 steps a run: whether it works, not what it shows")
    parser.add_argument(
        "--report", dest="report_only", action="store_true", help="run nothing, report what is finished"
    )


def positive(text: str) -> int:
    return number(int, text, lambda value: value >= 1, "a whole number of at least 1")


def share(text: str) -> float:
    return number(float, text, lambda value: 0 < value <= 1, "above 0, and at most 1")


def seed(text: str) -> int:
    return number(int, text, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")


def not_negative(text: str) -> int:
    return number(int, text, lambda value: value >= 0, "a whole number from 0 on")


def port(text: str) -> int:
    return number(int, text, lambda value: 0 <= value < 2**16, "a whole number from 0 to 65535")


def above_zero(text: str) -> float:
    return number(float, text, lambda value: 0 < value < math.inf, "a number above 0")


def number(kind: Callable[[str], T], text: str, fits: Callable[[T], bool], valid: str) -> T:
    """Raises ArgumentTypeError with what is valid."""
    try:
        if fits(value := kind(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be {valid}")


def no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def verb_list() -> str:
    return "verbs:\n" + "\n".join(f"  {name:<10} {verb.summary}" for name, verb in VERBS.items())


MODEL_HELP = "a run's folder (its best checkpoint), a checkpoint file, or a Hugging Face folder"
COMMANDS, STUDIES = "dsv3_lightning.commands", "dsv3_lightning.studies"
VERBS = {
    "prepare": Verb(f"{COMMANDS}.prepare:run", "Tokenize and cut a config's data.", config_arguments),
    "run": Verb(f"{COMMANDS}.run:run", "Train, or continue training.", config_arguments),
    "validate": Verb(f"{COMMANDS}.validate:run", "Check a config, and do nothing else.", config_arguments),
    "generate": Verb(f"{COMMANDS}.generate:generate", "Continue a text with a trained model.", generate_arguments),
    "chat": Verb(f"{COMMANDS}.chat:chat", "Talk with a trained model, line by line.", chat_arguments),
    "serve": Verb(f"{COMMANDS}.serve:serve", "Serve a trained model to OpenAI clients.", serve_arguments),
    "export": Verb(f"{COMMANDS}.export:export", "Write a run's model as a Hugging Face folder.", export_arguments),
    "import": Verb(
        f"{COMMANDS}.import_folder:import_folder",
        "Check a Hugging Face folder to start runs from.",
        import_arguments,
    ),
    "placement": Verb(
        f"{COMMANDS}.placement:placement", "Spread a model's experts over GPUs by their load.", placement_arguments
    ),
    "needle": Verb(f"{COMMANDS}.needle:needle", "See whether a model finds a line in a long text.", needle_arguments),
    "plan": Verb(f"{COMMANDS}.plan:run", "Show parameters, FLOP, memory, a run's time: on no device.", plan_arguments),
    "sweep": Verb(f"{STUDIES}.sweep:sweep", "Run an experiment: variants of a config, several seeds.", sweep_arguments),
    "compare": Verb(f"{STUDIES}.compare:compare", "Compare runs: a table and plots.", compare_arguments),
    "checkpoint": Verb(
        f"{COMMANDS}.checkpoint:checkpoint", "Show or judge a checkpoint, or make one file of it.", checkpoint_arguments
    ),
    "reproduce": Verb(
        f"{STUDIES}.reproduce:reproduce", "See which of the papers' claims hold here.", reproduce_arguments
    ),
    "doctor": Verb(f"{COMMANDS}.doctor:run", "Tell what this machine and installation can do.", no_arguments),
}
CONFIG_HELP = """\
All intervals (every_n_steps, log_every_n_steps, val_check_interval, warmup_steps) count optimizer steps.
Files are merged in order, overrides last; null removes a callback; ${{section.key}} refers to another setting.
Sections: run, model, data, optimizer, loss, compute, trainer, strategy, callbacks.
Every setting with its meaning and default: {base}

examples:
  {prog} laptop
  {prog} my.yaml optimizer.lr=1e-3 callbacks.sample_text=null trainer.max_steps=50
"""
