"""Tokens per second on 1 and 2 processes under DDP, FSDP2 and expert parallelism, and what of a step is communication.

python benchmarks/scaling.py [--steps 6] [--samples 2]

Each process computes on one thread, on samples of its own, over gloo. The share of communication is what a step gets
faster by when collectives do nothing (torch's `fake` backend), with as many processes beside it. The last row sends
every slot to all ranks, which keep their experts' ones: what expert parallelism would be without all-to-all.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_single_autograd, reduce_scatter_single_autograd
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.model.transformer import Transformer, fill
from dsv3_lightning.parallel.dispatch import AllToAll
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import StrategyConfig, mesh_shape
from dsv3_lightning.parallel.sharding import shard_model
from dsv3_lightning.parallel.tensors import place
from dsv3_lightning.training.dry_run import EvenLoads
from dsv3_lightning.training.optimizer import build_optimizer

WAYS = ("ddp", "fsdp2", "fsdp2_ep", "all-gather")


class Gathered(NamedTuple):
    """x_PSD of all ranks, padded to S slots each, and their counts_PE; of this rank's slots there are `own`."""

    x_PSD: Tensor
    counts_PE: Tensor
    own: int


class AllGather:
    """Every rank gets all slots, computes with its experts, and the results are added up."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def send(self, x_SD: Tensor, counts_E: Tensor) -> Gathered:
        ranks, longest = self.group.size(), torch.tensor(len(x_SD))
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.group)
        padded = F.pad(x_SD, (0, 0, 0, max(int(longest), len(x_SD)) - len(x_SD)))
        counts = [torch.zeros_like(counts_E) for _ in range(ranks)]
        dist.all_gather(counts, counts_E, group=self.group)
        x_PSD = all_gather_single_autograd(padded, 0, self.group).unflatten(0, (ranks, -1))
        return Gathered(x_PSD, torch.stack(counts), len(x_SD))

    def collect(self, sent: Gathered, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ranks, slots = sent.x_PSD.shape[:2]
        mine = sent.counts_PE.chunk(ranks, 1)[self.group.rank()]
        before = sent.counts_PE.cumsum(1).chunk(ranks, 1)[self.group.rank()][:, 0] - mine[:, 0]
        where = [torch.arange(p * slots + int(b), p * slots + int(b + n))
                 for p, (b, n) in enumerate(zip(before, mine.sum(1), strict=True))]  # fmt: skip
        expert = torch.cat([torch.arange(mine.shape[1]).repeat_interleave(row) for row in mine])
        order = expert.argsort(stable=True)
        index = torch.cat(where)[order]
        y = compute(sent.x_PSD.flatten(0, 1).index_select(0, index), mine.sum(0).cumsum(0))
        all_y = torch.zeros_like(sent.x_PSD).flatten(0, 1).to(y.dtype).index_copy(0, index, y)
        return reduce_scatter_single_autograd(all_y, "sum", 0, self.group)[: sent.own]


class Model(nn.Module):
    """The mean loss as a module's forward pass, which is what DDP wraps."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        losses = self.model.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), targets)
        return losses.nll_K.sum() / targets.numel() + sum(term.mean() for term in losses.balance.values())


def build(way: str, ranks: int, pretended: bool) -> tuple[nn.Module, Any]:
    config = check(compose(["laptop"]).tree)
    with torch.device("meta"):
        transformer = Transformer(config.model)
    if way == "ddp":
        transformer.to_empty(device="cpu").init_weights(1, fill)
        model = Model(transformer)
        return (model if pretended or ranks == 1 else DistributedDataParallel(model)), config  # it checks results
    strategy = StrategyConfig(kind="fsdp2" if way == "fsdp2" else "fsdp2_ep")
    dispatcher = EvenLoads if pretended else AllGather if way == "all-gather" else AllToAll
    meshes = build_meshes(mesh_shape(strategy, ranks, ranks, config.model), "cpu")
    shard_model(transformer, meshes, strategy, False, dispatcher)
    transformer.to_empty(device="cpu").init_weights(1, place)
    return Model(transformer), config


def rank_seconds(way: str, ranks: int, pretended: bool, steps: int, samples: int) -> float:
    """Seconds per step of one rank, the first two left out."""
    torch.set_num_threads(1)
    if pretended:
        dist.init_process_group("fake", rank=int(os.environ["RANK"]), world_size=ranks, store=FakeStore())
    else:
        dist.init_process_group("gloo")
    model, config = build(way, ranks, pretended)
    optimizer = build_optimizer(model, config.optimizer)
    depth, T = config.model.mtp_depth, config.data.sequence_length
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    for step in range(steps + 2):
        if step == 2:
            start = time.perf_counter()
        tokens = torch.randint(config.model.vocab_size, (samples, T + 1 + depth), generator=generator)
        targets = torch.stack([tokens[:, 1 + k : 1 + k + T] for k in range(1 + depth)], 1)
        optimizer.zero_grad()
        model(tokens, targets).backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps


def measure(way: str, ranks: int, pretended: bool, arguments: argparse.Namespace) -> float:
    """Seconds per step of the slowest of `ranks` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [way, str(ranks), str(int(pretended)), str(arguments.steps), str(arguments.samples)]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks),
                           "OMP_NUM_THREADS": "1"}  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, __file__, "--rank", *words], env=common | {"RANK": str(rank)},
                         stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), f"{way} on {ranks} ranks failed"
    return max(json.loads(output.splitlines()[-1]) for output in outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--samples", type=int, default=2, help="per process and step, of 128 tokens")
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        way, ranks, pretended, steps, samples = arguments.rank
        print(json.dumps(rank_seconds(way, int(ranks), bool(int(pretended)), int(steps), int(samples))))
        return
    tokens = arguments.samples * check(compose(["laptop"]).tree).data.sequence_length
    print("| way | tokens/s, 1 process | 2 processes | of which communication |\n| --- | --- | --- | --- |")
    for way in WAYS:
        one = f"{tokens / measure(way, 1, False, arguments):,.0f}" if way != "all-gather" else ""
        two, without = (measure(way, 2, pretended, arguments) for pretended in (False, True))
        print(f"| {way} | {one} | {2 * tokens / two:,.0f} | {max(0.0, 1 - without / two):.0%} |", flush=True)


if __name__ == "__main__":
    main()
