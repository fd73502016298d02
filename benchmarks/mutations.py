"""Random mutations of shipped configs: each is valid, or refused in one line that names the place, and nothing more.

python benchmarks/mutations.py [--count 1000] [--seed 0] [NAME...]

Half of the mutants are made of a config's own file, half of all its settings. They go through `dsv3 validate` in this
process; a traceback, another exit status than 0 or 2, more than one line or a file left behind is printed, and makes
the exit status 1.
"""

import argparse
import contextlib
import copy
import io
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_lightning.cli import main
from dsv3_lightning.common.yaml import dumps
from dsv3_lightning.config.compose import compose, find, presets, read_yaml
from dsv3_lightning.config.schema import check, to_tree

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**30, -(10**400), 2**63, 0.0, 0.5, -2.5, 1e300, float("nan"), float("inf"), "",
    " ", "x", "no", "010", "1e5", "~", "${run.seed}", "${", "${nothing.here}", "${a.b", r"\${x}", "???", "a\nb", "\x07",
    "实", "/dev/null", "../x", "~nobody/x", "x" * 5000, [], [None], [1, 2], ["a"], [[]], [{}], {}, {"a": 1}, {"": None},
    {1: 2}, {"class_path": "no.Such"}, {"class_path": 3}, {"kind": "fsdp2"}, {"init_args": {}}, [[[[1]]]],
]  # fmt: skip
KINDS = ("value", "value", "value", "value", "remove", "misspell", "wrap", "copy", "add")
LIMIT = 30  # seconds for one mutant
LINE = re.compile(r"dsv3: error: [^\n]+(:|=)[^\n]*\n")


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values below a tree of dicts and lists."""
    parts = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, part in parts for place in [(*path, key), *places(part, (*path, key))]]


def value_at(tree: Any, path: tuple[Any, ...] | list[Any]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def mutate(tree: Any, rng: random.Random) -> str:
    """Changes a tree in place at one random place, and says how."""
    *above, key = rng.choice(places(tree))
    node, kind = value_at(tree, above), rng.choice(KINDS)
    if kind == "remove":
        del node[key]
    elif kind == "misspell" and isinstance(node, dict):
        node[misspelt(str(key), rng)] = node.pop(key)
    elif kind == "wrap":
        node[key] = rng.choice([[node[key]], {"a": node[key]}, str(node[key])])
    elif kind == "copy":
        node[key] = copy.deepcopy(value_at(tree, rng.choice(places(tree))))
    elif kind == "add" and isinstance(node, dict):
        node[rng.choice(["x", "speed", "class_path", "name", 7, "a.b", "${x}"])] = rng.choice(VALUES)
    else:
        node[key] = rng.choice(VALUES)
    return f"{kind} {'.'.join(map(str, (*above, key)))}"


def misspelt(word: str, rng: random.Random) -> str:
    place = rng.randrange(len(word) + 1)
    return rng.choice([word[:place] + word[place + 1 :], word[:place] + "q" + word[place:], word.upper(), f"{word} "])


def outcome(command: list[str], folder: Path) -> tuple[str, str]:
    """(what went wrong or nothing, what was printed as an error) of a command that may refuse its input.

    folder: the working folder, which has to stay as it is.
    """

    def too_long(number: int, frame: Any) -> None:
        raise TimeoutError(f"{LIMIT} s")

    before, output, errors = sorted(folder.rglob("*")), io.StringIO(), io.StringIO()
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(command)
    except BaseException:  # whatever it is, it is what the benchmark looks for
        return traceback.format_exc(), errors.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    text = errors.getvalue()
    if sorted(folder.rglob("*")) != before:
        return "left a file behind", text
    if code == 0:
        return "" if not text else "an error with exit status 0", text
    if code != 2:
        return f"exit status {code}", text
    return "" if LINE.fullmatch(text) else "not one line that names the place", text


def config_mutants(name: str, rng: random.Random) -> Callable[[], tuple[str, str]]:
    """Makes mutants of a shipped config: how each was made, and its YAML."""
    trees = [read_yaml(find(name, Path())), to_tree(check(compose([name]).tree))]

    def mutant() -> tuple[str, str]:
        tree = copy.deepcopy(rng.choice(trees))
        steps = [mutate(tree, rng) for _ in range(rng.choice((1, 1, 2, 4))) if places(tree)]
        return ", ".join(steps), dumps(tree)

    return mutant


def try_mutants(name: str, count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """How many were valid and refused, and what went wrong with the others. Works in `folder`, as working folder."""
    mutant, counts, failures = config_mutants(name, random.Random(f"{seed} {name}")), Counter[str](), []
    file = folder / "mutant.yaml"
    for _ in range(count):
        how, text = mutant()
        file.write_text(text, encoding="utf-8")
        wrong, printed = outcome(["validate", str(file)], folder)
        counts["wrong" if wrong else "refused" if printed else "valid"] += 1
        if wrong:
            failures.append(f"{name}: {how}: {wrong}\n{printed}")
    return counts, failures


def report(names: list[str], count: int, seed: int) -> int:
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in names:
            start = time.monotonic()
            counts, failures = try_mutants(name, count, seed, Path(folder))
            print(f"{name}: {dict(counts)} in {time.monotonic() - start:.0f} s", flush=True)
            print(*failures, sep="\n", end="")
            worst |= bool(failures)
        os.chdir("/")
    return worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="mutants of each config; default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("names", nargs="*", metavar="NAME", help="presets; default: all but base")
    given = parser.parse_args()
    names = given.names or [name for name in presets() if name not in ("base", "cleaning")]
    sys.exit(report(names, given.count, given.seed))
