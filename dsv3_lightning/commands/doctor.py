"""`dsv3 doctor`: a table of what this machine and installation can do, or a test of its devices. Changes nothing."""

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_lightning import __version__
from dsv3_lightning.common.flags import positive
from dsv3_lightning.common.table import si

if TYPE_CHECKING:
    import torch

PACKAGES = "torch lightning torchmetrics omegaconf jsonargparse tokenizers tensorboard numpy".split()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--node",
        type=positive,
        metavar="N",
        help="test N devices by a matrix product each and an all-reduce; exit code 1 if one fails",
    )


def run(node: int | None) -> int:
    if node is not None:
        from dsv3_lightning.runs.node_check import report

        return report(node)
    rows = [("dsv3-lightning", f"{__version__} in {Path(__file__).parents[1]}"), ("python", interpreter())]
    rows += [(name, installed(name)) for name in PACKAGES]
    rows += [("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))]
    rows += [("memory", memory())]
    rows += [row for device in devices() for row in (("device", describe(device)), ("matrix products", speed(device)))]
    rows += [("script `lightning`", script("lightning")), ("runs/", writable(Path("runs")))]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0


def interpreter() -> str:
    return f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}"


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def memory() -> str:
    try:
        return si(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "B")
    except (AttributeError, ValueError, OSError):
        return "unknown"


def devices() -> "Iterator[torch.device]":
    import torch

    yield torch.device("cpu")
    if torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            yield torch.device(torch.accelerator.current_accelerator().type, index)  # type: ignore[union-attr]


def describe(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name}, {si(properties.total_memory, 'B')}"
    if device.type == "cpu":
        return f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return str(device)


def speed(device: "torch.device") -> str:
    """Measured fp32 and bf16 speed, from which `precision: auto` chooses."""
    import torch

    from dsv3_lightning.training.precision import measure_gemm

    full, half = (measure_gemm(dtype, device) for dtype in (torch.float32, torch.bfloat16))
    return f"fp32 {si(full, 'FLOP/s')}, bf16 {si(half, 'FLOP/s')}: bf16 is {half / full:.2g} times as fast"


def script(name: str) -> str:
    """The program that the name runs now, and every installed package that claims it (the last installed wins)."""
    claims = entry_points(group="console_scripts", name=name)
    owners = sorted({f"{claim.dist.name} ({claim.value})" for claim in claims if claim.dist})
    return f"{shutil.which(name) or 'not on the PATH'}; claimed by {', '.join(owners) or 'no package'}"


def writable(folder: Path) -> str:
    """Whether a file can be written, by trying, since permission bits don't show read-only or full disks."""
    parent = folder if folder.is_dir() else folder.absolute().parent
    try:
        with tempfile.NamedTemporaryFile(dir=parent):
            return f"{folder.absolute()} can be written, {si(shutil.disk_usage(parent).free, 'B')} free"
    except OSError as error:
        return f"{folder.absolute()} can't be written: {error.strerror}"
