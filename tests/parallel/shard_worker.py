"""One of two ranks that write a folder of shards and read it in other layouts, as torch reads it and as runs do.

python -m tests.parallel.shard_worker FOLDER: prints what it found, for the test to compare.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints import loading
from dsv3_lightning.parallel.checkpoints.metadata import read_index
from dsv3_lightning.parallel.checkpoints.names import SHARDS
from dsv3_lightning.parallel.checkpoints.one_file import PARTS, AtomicCheckpointIO, step_of
from dsv3_lightning.parallel.checkpoints.saving import Saver
from dsv3_lightning.parallel.checkpoints.shards import split
from dsv3_lightning.parallel.tensors import local_shard

SHAPES = {"model.one": (7,), "model.two": (5, 6), "model.few": (1, 3), "model.three": (4, 3, 2)}
LAYOUTS = ((Shard(0),), (Shard(1),), (Replicate(),))
PARAMETERS = list(SHAPES)


def state(mesh, layout, value):
    """Weights of `value(shape)` in the layout, as far as they have that dim, and a plain tensor; their moments."""
    spread = {
        name: distribute_tensor(value(shape), mesh, [Shard(0)] if layout == (Shard(1),) and len(shape) < 2 else layout)
        for name, shape in SHAPES.items()
    }
    return spread | {"model.plain": value((3,))}, list(spread.values())


def checkpoint(own, weights):
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": w * 2, "exp_avg_sq": w * 3} for i, w in enumerate(weights)}
    optimizer = {"state": moments, "param_groups": [{"params": list(range(len(weights)))}]}
    other = dict.fromkeys(PARTS, 0) | {"global_step": 3, "TextDataModule": {"next_sample": 1}, "settings": {}}
    average = {"Average": {"mean": {name.removeprefix("model."): own[name] * 5 for name in PARAMETERS}}}
    return other | {"state_dict": own, "optimizer_states": [optimizer], "callbacks": average}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    rank, path, opened = dist.get_rank(), folder / "step=3.ckpt", []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    torch.manual_seed(1)
    saver = Saver()
    own, weights = state(mesh, LAYOUTS[0], torch.randn)
    saver.save(checkpoint(own, weights), path)
    saver.finish()
    saver.close()
    dist.barrier()

    for number, layout in enumerate(LAYOUTS):
        opened.clear()
        if rank == 0:
            step_of(path)  # as a start does before
        empty, order = state(mesh, layout, lambda shape: torch.full(shape, torch.nan))
        got = loading.read_parts(path, empty, [dict(enumerate(order))])
        print(f"opened {number}:", sorted({Path(name).name for name in opened if str(folder) in name}), flush=True)
        print(f"metadata {number}:", sum(name.endswith(".metadata") for name in opened), flush=True)
        wanted = checkpoint(*state(mesh, layout, lambda shape: torch.full(shape, torch.nan)))
        theirs = split(wanted)[0]
        dcp.load(theirs, checkpoint_id=path / SHARDS)
        ours = split(got)[0]
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert type(tensor) is type(ours[key]) and tensor.dtype == ours[key].dtype
            one, other = (t.to_local() if isinstance(t, DTensor) else t for t in (tensor, ours[key]))
            assert torch.equal(one, other) and not one.isnan().any(), (layout, key)
        assert got["optimizer_states"][0]["state"][1]["step"] == 3 and got["global_step"] == 3
    whole = {key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
             for key, tensor in split(checkpoint(own, weights))[0].items()}  # fmt: skip
    assert all(torch.equal(tensor, whole[key]) for key, tensor in split(loading.read_whole(path))[0].items())
    only = loading.read_parts(path, own, [])
    assert only["state_dict"].keys() == own.keys()

    refused("another", path, {**own, "model.two": own["model.three"]}, weights)
    refused("fewer", path, {k: v for k, v in own.items() if k != "model.plain"}, weights)
    refused("optimizer", path, own, [weights[:2]])
    if rank == 0:  # in what the second rank reads, alone
        index = read_index(path)
        shard = next(s for s, name in zip(range(len(index)), index.names(torch.arange(len(index)).numpy()))
                     if name == "model/model.two" and index.offsets[s][0] > 0)  # fmt: skip
        with open(path / SHARDS / index.files[index.file[shard]], "r+b") as file:
            file.seek(int(index.start[shard]))
            file.write(bytes(int(index.length[shard])))
    dist.barrier()
    refused("damaged", path, own, weights)
    if rank == 0:
        os.truncate(next((path / SHARDS).glob("__1_0*")), 10)
    dist.barrier()
    refused("cut", path, own, weights)
    map_file(folder / "one.ckpt", mesh)
    dist.barrier()
    dist.destroy_process_group()


def refused(what, path, own, weights):
    try:
        loading.read_parts(
            path, own, [dict(enumerate(of_one)) for of_one in (weights if isinstance(weights[0], list) else [weights])]
        )
    except ConfigError as error:
        print(f"{what}:", error, flush=True)


def map_file(path: Path, mesh) -> None:
    """Prints how much of a file of one large tensor is in this process's memory once it has its half."""
    size = 2**25
    if dist.get_rank() == 0:
        content = dict.fromkeys(PARTS, 0) | {"TextDataModule": {"next_sample": 1}}
        AtomicCheckpointIO().save_checkpoint(content | {"state_dict": {"w": torch.ones(size // 4)}}, path)
    dist.barrier()
    weight = distribute_tensor(torch.zeros(size // 4), mesh, [Shard(0)])
    whole = AtomicCheckpointIO().load_checkpoint(path, mmap=True)["state_dict"]["w"]
    assert local_shard(whole, weight).sum() == size // 8
    blocks = Path("/proc/self/smaps").read_text().split("VmFlags") if sys.platform == "linux" else []
    resident = [int(line.split()[1]) * 1024 for block in blocks if path.name in block
                for line in block.splitlines() if line.startswith("Rss")]  # fmt: skip
    print("resident:", sum(resident) / size, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
