"""What a rank needs to find and to describe the shards of many ranks: seconds and memory, with made-up metadata.

python benchmarks/metadata.py [--entries 100000 1000000] [--ranks 1000]

Every tensor is cut into one shard per rank, and the files are as long as the metadata say, without content. V3 on 2,048
ranks has 5.7 million entries. Each part is a process of its own. Printed are its CPU time, which other work on the
machine hardly changes, and its peak of memory beyond that after imports.

- each rank alone: what every rank did: all metadata read, all files looked at, then torch's reader reads the metadata
  again and plans.
- the first rank: reads the metadata, looks at all files, makes the index, and pickles it for the broadcast.
- another rank: unpickles the index and finds its shards.
- torch's first rank: what happened in the first rank's training process at each save: the plans of all ranks unpickled,
  joined to metadata, and pickled.
- the first rank's writer: in a process of its own, and once for as long as nothing changes: the indices of all ranks
  unpacked, joined, and written as torch's metadata.
"""

import argparse
import gc
import pickle
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3_lightning.parallel.checkpoints.index import Index, joined, narrow
from dsv3_lightning.parallel.checkpoints.metadata import metadata_of, read_index
from dsv3_lightning.parallel.checkpoints.names import SHARDS

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
    before, start = peak(), time.process_time()
    said = part(folder, tensors, ranks)
    print(f"{time.process_time() - start:.2f} s, {(peak() - before) / 1e6:,.0f} MB; {said}")


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


def torchs_plans(folder: Path, tensors: int, ranks: int) -> str:
    """Made up: what each rank sends to the first one."""
    properties, size = TensorProperties(), torch.Size((ranks * ROWS, COLUMNS))
    sizes = torch.Size((ROWS, COLUMNS))
    with open(folder / "plans", "wb") as file:
        for rank in range(ranks):
            offset = torch.Size((rank * ROWS, 0))
            chunk = ChunkStorageMetadata(offset, sizes)
            data = TensorWriteData(chunk, properties, size)
            indices = [MetadataIndex(name, offset, rank) for name in names(tensors)]
            items = [WriteItem(index, WriteItemType.SHARD, None, data) for index in indices]
            results = [WriteResult(item.index, BYTES, _StorageInfo(f"__{rank}_0.distcp", number * BYTES, BYTES))
                       for number, item in enumerate(items)]  # fmt: skip
            pickle.dump((SavePlan(items, planner_data={name: (name,) for name in names(tensors)}), results), file)
    return ""


def torchs_first(folder: Path, tensors: int, ranks: int) -> str:
    with open(folder / "plans", "rb") as file:
        plans, results = zip(*(pickle.load(file) for _ in range(ranks)), strict=True)
    planner = DefaultSavePlanner()
    planner.set_up_planner({}, is_coordinator=True)
    _, metadata = planner.create_global_plan(list(plans))
    metadata.storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}
    return f"{len(pickle.dumps(metadata)) / 1e6:,.1f} MB of .metadata"


def indices(folder: Path, tensors: int, ranks: int) -> str:
    """Made up: what each writer sends to the first one."""
    zeros, sizes = np.zeros(tensors, np.int64), np.tile(np.array([ROWS, COLUMNS]), (tensors, 1))
    described = dict.fromkeys(names(tensors), (torch.Size((ranks * ROWS, COLUMNS)), torch.float32))
    sent = []
    for rank in range(ranks):
        arrays = (np.arange(tensors + 1), zeros, np.arange(tensors) * BYTES, zeros + BYTES,
                  np.tile(np.array([rank * ROWS, 0]), (tensors, 1)), sizes)  # fmt: skip
        index = Index(described, [f"__{rank}_0.distcp"], *map(narrow, arrays))
        sent.append(zlib.compress(pickle.dumps(index)))
    (folder / "indices").write_bytes(pickle.dumps(sent))
    return f"{sum(map(len, sent)) / 1e6:,.1f} MB sent"


def first_writer(folder: Path, tensors: int, ranks: int) -> str:
    sent = pickle.loads((folder / "indices").read_bytes())
    content = metadata_of(joined([pickle.loads(zlib.decompress(index)) for index in sent]))
    return f"{len(content) / 1e6:,.1f} MB of .metadata"


PARTS = {
    "(made up)": make, "each rank alone": alone, "the first rank": first, "another rank": other,
    "(made up plans)": torchs_plans, "torch's first rank": torchs_first,
    "(made up indices)": indices, "the first rank's writer": first_writer,
}  # fmt: skip

if __name__ == "__main__":
    main()
