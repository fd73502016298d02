"""A test of one node before a run: each device multiplies, and all of them add up a tensor together."""

import multiprocessing
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dsv3_lightning.planning.hardware import gpu_of_device
from dsv3_lightning.training.precision import measure_gemm

SLOWEST = 0.4  # share of the data sheet's peak that a healthy GPU reaches in large products, with room for power limits


def check_node(processes: int, seconds: float = 180.0) -> list[str]:
    """What is wrong with this node, a line each; empty if nothing is. A process per device, in limited time."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None and torch.accelerator.device_count() < processes:
        return [f"has {devices(torch.accelerator.device_count())}, needs {processes}"]
    context, deadline = multiprocessing.get_context("spawn"), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=check_device, args=(rank, processes, folder)) for rank in range(processes)]
        for process in started:
            process.start()
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        wrong = [verdict(rank, process.exitcode, Path(folder)) for rank, process in enumerate(started)]
        for process in started:
            process.kill()
            process.join()
    return [line for line in wrong if line is not None]


def verdict(rank: int, code: int | None, folder: Path) -> str | None:
    """What is wrong with a device, from the exit code of its process and the file in which it says more."""
    said = folder / f"{rank}.txt"
    if said.is_file():
        return f"device {rank}: {said.read_text()}"
    if code is None:
        return f"device {rank}: not done in time"
    return f"device {rank}: ended with exit code {code}" if code else None


def check_device(rank: int, processes: int, folder: str) -> None:
    """The body of a device's process: writes what is wrong into <folder>/<rank>.txt and exits with 1."""
    try:
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = torch.device("cpu") if kind is None else torch.device(kind.type, rank)
        if kind is None:
            torch.set_num_threads(1)
        else:
            torch.accelerator.set_device_index(rank)
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.FileStore(f"{folder}/store", processes)
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
        wrong = wrong_product(device) or wrong_sum(device, rank, processes) or slow_product(device)
        dist.destroy_process_group()
    except Exception as error:  # whatever is raised, the node can't be used
        wrong = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if wrong is not None:
        Path(folder, f"{rank}.txt").write_text(wrong)
        sys.exit(1)


def wrong_product(device: torch.device) -> str | None:
    """Compares a bf16 product, exact since numbers and sums are below 256, with the CPU's in int64. None: no fault."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randint(-1, 2, (2, 512, 512), generator=generator)
    found = (a.to(device, torch.bfloat16) @ b.to(device, torch.bfloat16)).float().cpu()
    differing = int((found != a @ b).sum())
    return f"{differing} of {found.numel()} numbers of a matrix product are wrong" if differing else None


def wrong_sum(device: torch.device, rank: int, processes: int) -> str | None:
    """Tests an all-reduce of 4 MB over the node's devices. None: no fault."""
    values = torch.full((1 << 20,), float(rank + 1), device=device)
    dist.all_reduce(values)
    expected = processes * (processes + 1) / 2
    differing = int((values != expected).sum())
    return f"{differing} of {values.numel()} numbers of an all-reduce are wrong" if differing else None


def slow_product(device: torch.device) -> str | None:
    gpu = gpu_of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else too_slow(measure_gemm(torch.bfloat16, device), gpu.peak)


def too_slow(measured: float, peak: float) -> str | None:
    """
    >>> too_slow(700e12, 989e12), too_slow(200e12, 989e12)
    (None, "matrix products reach 200 TFLOP/s, 0.20 of the data sheet's peak")
    """
    if measured >= SLOWEST * peak:
        return None
    return f"matrix products reach {measured / 1e12:.0f} TFLOP/s, {measured / peak:.2f} of the data sheet's peak"


def report(processes: int) -> int:
    """Prints one line per fault, or that there is none; returns the exit status."""
    wrong = check_node(processes)
    for line in wrong or [f"{devices(processes)} passed, in matrix products and an all-reduce"]:
        print(f"{socket.gethostname()}: {line}", flush=True)
    return 1 if wrong else 0


def devices(number: int) -> str:
    """
    >>> devices(1), devices(8)
    ('1 device', '8 devices')
    """
    return f"{number} device{'s' * (number != 1)}"
