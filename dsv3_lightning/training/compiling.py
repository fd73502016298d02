"""Whether a run computes its fused functions by programs that torch.compile makes, and where those are kept.

A process of its own compiles, while the run prepares its data, and writes into the cache; the run, and all its ranks,
then only load. A run keeps what it began with, since compiled functions round otherwise.

    python -m dsv3_lightning.training.compiling FOLDER DTYPE
"""

import hashlib
import inspect
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dsv3_lightning.model import fused_loss, fused_norm, swiglu  # noqa: F401  have fused functions
from dsv3_lightning.model.fused import Fused, compile_all, warm_up

SECONDS = 15.0  # that a run may wait for the compiler
CACHE = "TORCHINDUCTOR_CACHE_DIR"


class Choice(NamedTuple):
    """on: whether fused functions are compiled. line: for the start of a run, None where nobody asked."""

    on: bool
    line: str | None


def obstacle(device_type: str, capability: str, compiler: str | None, disabled: bool) -> str | None:
    """Why nothing can be compiled here; None if it can. capability: torch's name of the CPU's instructions."""
    if disabled:
        return "TORCHDYNAMO_DISABLE is set"
    if device_type != "cpu":
        return f"tried on CPUs alone, and this is a {device_type}"
    if "AVX" not in capability:
        return f"the CPU has no AVX ({capability})"
    return None if compiler else "there is no C++ compiler (g++, or what CXX names)"


def obstacle_here(device_type: str) -> str | None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    disabled = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
    return obstacle(device_type, torch.backends.cpu.get_cpu_capability(), compiler, disabled)


def choose(setting: bool | str, begun_with: bool | None, blocked: str | None, compiled: Callable[[], str]) -> Choice:
    """What a run does. setting: compute.compile. begun_with: what an earlier start of the run did, if there was one.

    compiled: waits for the compiler, and returns why nothing was compiled in time; empty if it was.
    """
    wanted = begun_with if setting == "auto" and begun_with is not None else setting
    if not wanted:
        return Choice(False, None)
    why = blocked or compiled()
    if why:
        changed = "; the run began with compiled functions, so that rounding differs" if begun_with else ""
        asked = wanted is True or not blocked
        return Choice(False, f"compiled: nothing, {why}{changed}" if asked else None)
    return Choice(True, f"compiled: {', '.join(each.__name__ for each in Fused.all)}")


class Compiler:
    """The programs for this machine in a cache folder, and the process that makes them if they aren't there."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.marker = folder / f"{key_of(dtype)}.done"
        self.begun = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts to compile where that is needed and the folder can be written."""
        if self.marker.exists() or not writable(self.folder):
            return
        name = str(self.dtype).split(".")[-1]
        command = [sys.executable, "-m", "dsv3_lightning.training.compiling", str(self.folder), name]
        with open(self.folder / "compiler.log", "wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, patience: float = SECONDS) -> str:
        """Why the programs aren't there after so many seconds since the start; empty if they are."""
        if self.marker.exists():
            return ""
        if self.process is None:
            return f"compute.compile_cache={self.folder} has no programs for this machine and can't be written"
        try:
            status = self.process.wait(max(0.0, self.begun + patience - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"since that takes more than {patience:.0f} s; runs that start later find it in {self.folder}"
        return "" if status == 0 else f"the compiler failed: {self.folder / 'compiler.log'}"

    def load(self) -> None:
        """Turns compiled functions on in this process. A folder that can't be written is copied."""
        os.environ[CACHE] = str(self.folder if writable(self.folder) else copied(self.folder))
        compile_all()


def key_of(dtype: torch.dtype) -> str:
    """What the programs depend on: torch, Python, the machine, the dtype and the functions."""
    sources = [inspect.getsource(each.function) for each in Fused.all]
    parts = (torch.__version__, platform.python_version(), platform.machine(), cpu_flags(), str(dtype), *sources)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def cpu_flags() -> str:
    """The instructions that the CPU has; compilers use all of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    return next((line for line in lines if line.startswith("flags")), "")


def writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def copied(folder: Path) -> Path:
    own = Path(tempfile.mkdtemp(prefix="dsv3-compiled-"))
    shutil.copytree(folder, own, dirs_exist_ok=True)
    return own


def main(folder: Path, name: str) -> None:
    os.environ[CACHE] = str(folder)
    torch.set_num_threads(1)
    dtype = getattr(torch, name)
    compile_all()
    warm_up(dtype)
    (folder / f"{key_of(dtype)}.done").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
