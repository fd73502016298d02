"""What a rank needs to find its shards in a checkpoint of many ranks: seconds and memory, with made-up metadata.

python benchmarks/metadata.py [--entries 100000 1000000] [--ranks 1000]

Every tensor is cut into one shard per rank, and the files are as long as the metadata say, without content. V3 on 2,048
ranks has 5.7 million entries. Each part is a process of its own; its memory is its peak beyond that after imports.

- each rank alone: what every rank did: all metadata read, all files looked at, then torch's reader reads the metadata
  again and plans.
- the first rank: reads the metadata, looks at all files, makes the index, and pickles it for the broadcast.
- another rank: unpickles the index and finds its shards.
"""

import argparse
import gc
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3_lightning.parallel.checkpoints.index import read_index
from dsv3_lightning.parallel.checkpoints.shards import SHARDS

ROWS, COLUMNS, BYTES = 8, 16, 2**21  # of a shard; the bytes are those of V3's on 2,048 ranks, roughly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        measure(PARTS[arguments.part], arguments.folder, arguments.entries[0] // arguments.ranks, arguments.ranks)
        return
    for entries in arguments.entries:
        with tempfile.TemporaryDirectory() as folder:
            for part in PARTS:
                command = [sys.executable, __file__, "--part", part, "--folder", folder, "--entries", str(entries)]
                done = subprocess.run([*command, "--ranks", str(arguments.ranks)], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                print(f"{entries:,} entries, {part}: {done.stdout.strip()}", flush=True)


def measure(part: Callable[[Path, int, int], str], folder: Path, tensors: int, ranks: int) -> None:
    dist.init_process_group("fake", rank=5, world_size=ranks, store=FakeStore())
    own_tensors(1, ranks)  # which imports much
    before, start = peak(), time.perf_counter()
    said = part(folder, tensors, ranks)
    print(f"{time.perf_counter() - start:.2f} s, {(peak() - before) / 1e6:,.0f} MB; {said}")


def peak() -> int:
    """Peak memory of this process, in bytes. getrusage would report at least the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024


def names(tensors: int) -> list[str]:
    return [f"optimizer/0/{number}/exp_avg" for number in range(tensors)]


def own_tensors(tensors: int, ranks: int) -> dict[str, DTensor]:
    """The tensors, of which this rank holds its shards."""
    mesh = init_device_mesh("cpu", (ranks,))
    return {name: DTensor.from_local(torch.empty(ROWS, COLUMNS), mesh, [Shard(0)]) for name in names(tensors)}


def make(folder: Path, tensors: int, ranks: int) -> str:
    """Writes the metadata and the files."""
    gc.disable()  # here only, where it takes most of the time
    shards = folder / SHARDS
    shards.mkdir()
    entries, storage = {}, {}
    for number, name in enumerate(names(tensors)):
        offsets = [torch.Size((rank * ROWS, 0)) for rank in range(ranks)]
        chunks = [ChunkStorageMetadata(offset, torch.Size((ROWS, COLUMNS))) for offset in offsets]
        entries[name] = TensorStorageMetadata(TensorProperties(), torch.Size((ranks * ROWS, COLUMNS)), chunks)
        for rank, offset in enumerate(offsets):
            storage[MetadataIndex(name, offset, rank)] = _StorageInfo(f"__{rank}_0.distcp", number * BYTES, BYTES)
    for rank in range(ranks):
        with open(shards / f"__{rank}_0.distcp", "wb") as file:
            file.truncate(tensors * BYTES)
    size = (shards / ".metadata").write_bytes(pickle.dumps(Metadata(entries, None, storage)))
    return f"{size / 1e6:,.1f} MB of .metadata"


def alone(folder: Path, tensors: int, ranks: int) -> str:
    reader = dcp.FileSystemReader(folder / SHARDS)
    metadata = reader.read_metadata()
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    assert all((folder / SHARDS / name).stat().st_size >= end for name, end in ends.items())
    planner = DefaultLoadPlanner()
    planner.set_up_planner(own_tensors(tensors, ranks), reader.read_metadata(), is_coordinator=False)
    return f"{len(planner.create_local_plan().items):,} reads planned"


def first(folder: Path, tensors: int, ranks: int) -> str:
    sent = pickle.dumps(read_index(folder))
    (folder / "sent").write_bytes(sent)
    return f"{len(sent) / 1e6:,.1f} MB to send"


def other(folder: Path, tensors: int, ranks: int) -> str:
    index = pickle.loads((folder / "sent").read_bytes())
    own = slice(5 * ROWS, 6 * ROWS), slice(0, COLUMNS)
    shards = index.in_order_of_files(index.overlapping(dict.fromkeys(names(tensors), own)))
    return f"{len(index.names(shards)):,} reads planned"


PARTS = {"(made up)": make, "each rank alone": alone, "the first rank": first, "another rank": other}

if __name__ == "__main__":
    main()
