"""Stall of training for a sharded checkpoint, compared with a copy of the same tensors and with the full write.

python benchmarks/saving.py [--ranks 2] [--megabytes 500] [--tensors 200] [--pairs 5]

Every rank holds the given bytes in tensors of equal size, like weights and AdamW's two moments. Copies and saves
alternate; printed are medians over the pairs, on the slowest rank.
"""

import argparse
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dsv3_lightning.parallel.checkpoints.saving import Saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=500, help="of each rank")
    parser.add_argument("--tensors", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (arguments, Path(folder), port), arguments.ranks)


def measure(rank: int, arguments: argparse.Namespace, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    ranks, address = arguments.ranks, f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    rows = arguments.megabytes * 1_000_000 // 4 // 1024 // arguments.tensors
    parts = [torch.randn(rows, 1024) for _ in range(arguments.tensors)]
    state = {f"{index}": DTensor.from_local(part, mesh, [Shard(0)]) for index, part in enumerate(parts)}
    saver, times = Saver(), []
    copies: list[torch.Tensor] = []
    for pair in range(arguments.pairs + 1):
        save = partial(saver.save, {"state_dict": state, "optimizer_states": []}, folder / f"{pair}.ckpt")
        copy = partial(copies.extend, (part.clone() for part in parts))
        times.append([timed(work) for work in (copy, save, saver.finish)])
        copies.clear()
    copy, stall, write = (statistics.median(column) for column in zip(*times[1:]))
    if rank == 0:
        size = ranks * arguments.tensors * rows * 4096
        print(f"{size / 1e9:.2f} GB on {ranks} ranks, {arguments.pairs} pairs")
        print(f"a copy in memory {copy:.3f} s, training stands still {stall:.3f} s, written {write:.3f} s later")
        own, shared = (memory(saver.process.pid, kind) / 1e6 for kind in ("RssAnon", "RssShmem"))
        print(f"memory of a writer {own:,.0f} MB, and {shared:,.0f} MB that it shares with its rank")
    saver.close()
    dist.destroy_process_group()


def memory(process: int, kind: str) -> int:
    """Bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def timed(work: Callable[[], None]) -> float:
    """Seconds that `work` takes on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


if __name__ == "__main__":
    main()
