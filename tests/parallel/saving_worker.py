"""One of two ranks that save sharded checkpoints, whose writers are disturbed.

python -m tests.parallel.saving_worker FOLDER: prints what it found. At the end the second rank kills itself.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dsv3_lightning.errors import RunStopped, WriteError
from dsv3_lightning.parallel.checkpoints import loading, saving
from dsv3_lightning.parallel.checkpoints.one_file import PARTS

ENDINGS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


def checkpoint(step, **tensors):
    other = dict.fromkeys(PARTS, 0) | {"global_step": step, "TextDataModule": {"next_sample": 1}, "settings": {}}
    return other | {"state_dict": tensors, "optimizer_states": []}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, mesh, planned = dist.get_rank(), init_device_mesh("cpu", (2,)), []
    make = saving.plan_of
    saving.plan_of = lambda *what: (planned.append(1), make(*what))[1]

    def content(path):
        dist.barrier()
        found = loading.read_whole(path)
        return found["global_step"], {name: tensor.tolist() for name, tensor in found["state_dict"].items()}

    saver = saving.Saver(holders=[rank])  # as with pipelines, where ranks have parameters of their own
    weight = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
    copied = distribute_tensor(torch.ones(2, 2), mesh, [Replicate()])
    mine = {f"of{rank}": torch.full((2,), float(rank))}
    for step in (1, 2):
        saver.save(checkpoint(step, weight=weight, copied=copied, **mine), folder / f"step={step}.ckpt")
        saver.name_again(folder / f"step={step}.ckpt", folder / f"best-step={step}.ckpt")
        weight.to_local().add_(10)  # training goes on
        for name in ENDINGS:
            os.kill(saver.process.pid, getattr(signal, name))
        saver.finish()
    print("planned:", len(planned), flush=True)
    print("first:", content(folder / "step=1.ckpt"), flush=True)
    print("second:", content(folder / "best-step=2.ckpt"), flush=True)
    saver.save(checkpoint(3, weight=weight.to(torch.float64), **mine), folder / "step=3.ckpt")
    saver.finish()
    print("planned again:", len(planned), flush=True)
    print("third:", content(folder / "step=3.ckpt"), flush=True)

    if rank == 1:
        resource.prlimit(saver.process.pid, resource.RLIMIT_FSIZE, (100, 100))
    failing("full", saver, checkpoint(4, weight=weight), folder / "step=4.ckpt")
    if rank == 1:
        saver.process.kill()
    failing("killed", saver, checkpoint(5, weight=weight), folder / "step=5.ckpt")
    saver.close()
    print("zombies:", saver.process.returncode is None, flush=True)

    saver = saving.Saver()
    print("writer:", saver.process.pid, flush=True)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    failing("gone", saver, checkpoint(6, weight=weight), folder / "step=6.ckpt")
    saver.close()
    print("there:", sorted(path.name for path in folder.iterdir() if "logs" not in path.name), flush=True)
    os._exit(0)  # the process group would wait for the other rank


def failing(what, saver, content, path):
    try:
        saver.save(content, path)
        saver.finish()
    except (WriteError, RunStopped, dist.DistNetworkError) as error:
        print(f"{what}: {type(error).__name__} {error}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
