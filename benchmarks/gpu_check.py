"""Every check that needs a GPU, in ten minutes and without a network.

    make gpu-check [WHEELS=FOLDER]        or  python benchmarks/gpu_check.py [--wheels FOLDER] [--out gpu-check]

Uses the Python that starts it, with whatever is installed there, and installs nothing into it. Packages that are
missing may be carried in a folder of wheels (made by `pip download --only-binary=:all: -d FOLDER ...` where there is a
network); they go to a temporary folder on the path. The folder `--out` has the results: report.md, and the output of
each check. Without a CUDA GPU the same checks run at small sizes on the CPU, and the report says so. Exit code 1 if a
check fails.
"""

import argparse
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MODULES = {"pytest-timeout": "pytest_timeout", "pyyaml": "yaml"}  # where a package's name isn't its module's
EXTRA = ("pytest", "pytest-timeout")


class Check(NamedTuple):
    """A command of the list. limit: seconds. cpu: its arguments without a GPU; None leaves it out."""

    name: str
    arguments: list[str]
    limit: int
    cpu: list[str] | None


PARTS = ["-m", "benchmarks.gpu_parts"]
SMALL = ["--layers", "2", "--samples", "1", "--length", "64", "--rounds", "2"]
SMALL += [
    word
    for setting in ("hidden_size=64", "intermediate_size=64", "moe_intermediate_size=32", "vocab_size=512")
    for word in ("--set", f"model.{setting}")
]
CHECKS = [
    Check("kernels", ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_kernels.py"], 120,
          ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_kernels.py"]),
    Check("runs, waits and memory", ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_cuda.py"], 240,
          None),
    Check("times by part", PARTS, 240, [*PARTS, *SMALL]),
]  # fmt: skip


def requirements() -> list[str]:
    """The names of the project's dependencies, and of what the checks need."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.split("dependencies = [", 1)[1].split("\n]", 1)[0]
    return [re.split(r"[<>=!\[ ]", name)[0] for name in re.findall(r'^\s*"([^"]+)"', listed, re.M)] + list(EXTRA)


def missing(names: list[str]) -> list[str]:
    """The packages that this Python doesn't have."""
    return [name for name in names if importlib.util.find_spec(MODULES.get(name, name.replace("-", "_"))) is None]


def carry(wheels: Path, folder: str) -> None:
    """Unpacks all wheels of a folder into another. Ends the program where pip can't."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        sys.exit(f"gpu-check: --wheels {wheels}: there is no *.whl file")
    if subprocess.run([*command, *files]).returncode:
        sys.exit(f"gpu-check: --wheels {wheels}: pip could not install them")


def machine() -> list[str]:
    """Lines about this machine. torch is imported here, once it is known to be there."""
    import torch

    lines = [f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"]
    if not torch.cuda.is_available():
        return [*lines, "There is no CUDA GPU here: what follows was run on the CPU, at small sizes."]
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    versions = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return [*lines, f"{properties.name}, {memory}, compute capability {capability}, {versions}"]


def run(check: Check, arguments: list[str], out: Path, environment: dict[str, str]) -> tuple[str, str]:
    """The verdict with the seconds it took, and what was printed."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, timeout=check.limit, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output, verdict = done.stdout, "passed" if done.returncode == 0 else f"FAILED, exit code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        output = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        verdict = f"FAILED, not done in {check.limit} s"
    (out / f"{check.name.replace(' ', '-').replace(',', '')}.txt").write_text(output)
    return f"{verdict} ({time.monotonic() - start:.0f} s)", output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="a folder of wheels with what this Python lacks")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="the folder of the report")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as carried:
        if arguments.wheels:
            carry(arguments.wheels, carried)
            sys.path.insert(0, carried)
        if lacking := missing(requirements()):
            names = " ".join(lacking)
            sys.exit(f"gpu-check: this Python lacks {names}; carry them as wheels: make gpu-check WHEELS=FOLDER")
        path = os.pathsep.join([carried, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        lines = machine()
        on_cpu = lines[-1].startswith("There is no CUDA GPU")
        arguments.out.mkdir(parents=True, exist_ok=True)
        report = ["# GPU check", "", *lines, ""]
        failed = False
        print("\n".join(lines), flush=True)
        for check in CHECKS:
            chosen = check.cpu if on_cpu else check.arguments
            if chosen is None:
                verdict, output = "left out: needs a GPU", ""
            else:
                verdict, output = run(check, chosen, arguments.out, environment)
            failed |= verdict.startswith("FAILED")
            print(f"{check.name}: {verdict}", flush=True)
            shown = output[-6000:].strip()
            report += [f"## {check.name}: {verdict}", "", *(["```text", shown, "```", ""] if shown else [])]
        (arguments.out / "report.md").write_text("\n".join(report))
        print(f"report: {arguments.out / 'report.md'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
