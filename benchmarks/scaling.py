"""Tokens per second on 1 and 2 processes with DDP, FSDP2 and expert parallelism, and the share of communication.

python benchmarks/scaling.py [--steps 6] [--samples 2]

Each process computes on one thread, on different samples, over gloo. The share of communication is the time that a step
saves when collectives do nothing (torch's `fake` backend), with as many processes running. The last row sends every
routed token to all ranks, which keep those of their experts: expert parallelism without all-to-all.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
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
from dsv3_lightning.model.autocast import compute_dtype
from dsv3_lightning.model.init import fill
from dsv3_lightning.model.permute import Order, Permute, Unpermute, sort_by_expert
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.dispatch import AllToAll
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import StrategyConfig, mesh_shape
from dsv3_lightning.parallel.sharding import shard_model
from dsv3_lightning.parallel.tensors import fill_shard
from dsv3_lightning.training.dry_run import EvenLoads
from dsv3_lightning.training.optimizer import build_optimizer

WAYS = ("ddp", "fsdp2", "fsdp2_ep", "all-gather")


class Gathered(NamedTuple):
    """Routed tokens x_WRD of all W ranks, padded to R each, and their counts_WE; or, in x_WRD, the experts' outputs of
    this rank's tokens, [R, D]. counts_E, order: of this rank's tokens. index_R: indices of the tokens for this rank's
    experts, sorted by expert."""

    x_WRD: Tensor
    counts_WE: Tensor
    order: Order
    gates_NK: Tensor
    index_R: Tensor

    @property
    def counts_E(self) -> Tensor:
        return self.order.counts_E


class AllGather:
    """A dispatcher that sends all routed tokens to every rank, which computes its experts; the results are summed."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group, self.num_experts = group, num_experts

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Gathered:
        order = sort_by_expert(experts_NK, self.num_experts)
        x_RD = Permute.apply(x_ND.to(compute_dtype(x_ND)), order.order_R, order.rows_NK)
        counts_E = order.counts_E
        ranks, longest = self.group.size(), torch.tensor(len(x_RD))
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.group)
        padded_RD = F.pad(x_RD, (0, 0, 0, max(int(longest), len(x_RD)) - len(x_RD)))
        counts = [torch.zeros_like(counts_E) for _ in range(ranks)]
        dist.all_gather(counts, counts_E, group=self.group)
        x_WRD = all_gather_single_autograd(padded_RD, 0, self.group).unflatten(0, (ranks, -1))
        counts_WE = torch.stack(counts)
        return Gathered(x_WRD, counts_WE, order, gates_NK, self.rows_of_own_experts(counts_WE, x_WRD.shape[1]))

    def rows_of_own_experts(self, counts_WE: Tensor, padded: int) -> Tensor:
        rank, ranks = self.group.rank(), self.group.size()
        own_WE = counts_WE.chunk(ranks, 1)[rank]
        before_W = counts_WE.cumsum(1).chunk(ranks, 1)[rank][:, 0] - own_WE[:, 0]
        rows = [torch.arange(w * padded + int(before), w * padded + int(before + count))
                for w, (before, count) in enumerate(zip(before_W, own_WE.sum(1), strict=True))]  # fmt: skip
        expert_R = torch.cat([torch.arange(own_WE.shape[1]).repeat_interleave(row_E) for row_E in own_WE])
        return torch.cat(rows)[expert_R.argsort(stable=True)]

    def leave(self, sent: Gathered) -> None:
        pass

    def receive(self, sent: Gathered) -> tuple[Tensor, Tensor]:
        own_WE = sent.counts_WE.chunk(self.group.size(), 1)[self.group.rank()]
        return sent.x_WRD.flatten(0, 1).index_select(0, sent.index_R), own_WE.sum(0).cumsum(0)

    def send_back(self, y_RD: Tensor, sent: Gathered) -> Gathered:
        all_RD = torch.zeros_like(sent.x_WRD).flatten(0, 1).to(y_RD.dtype).index_copy(0, sent.index_R, y_RD)
        own_RD = reduce_scatter_single_autograd(all_RD, "sum", 0, self.group)[: len(sent.order.order_R)]
        return sent._replace(x_WRD=own_RD)

    def combine(self, returning: Gathered) -> Tensor:
        order = returning.order
        gates_R1 = Permute.apply(returning.gates_NK.reshape(-1, 1), order.order_R, order.rows_NK.view(-1, 1))
        y_RD = (returning.x_WRD * gates_R1).to(returning.x_WRD.dtype)
        return Unpermute.apply(y_RD, order.order_R, order.rows_NK)


class Model(nn.Module):
    """A module whose forward pass returns the mean loss, since DDP wraps only `forward`."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        losses = self.model.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), targets)
        return losses.nll_P.sum() / targets.numel() + sum(term.mean() for term in losses.balance.values())


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
    shard_model(transformer, meshes, strategy, "32-true", dispatcher)
    transformer.to_empty(device="cpu").init_weights(1, fill_shard)
    return Model(transformer), config


def rank_seconds(way: str, ranks: int, pretended: bool, steps: int, samples: int) -> float:
    """Seconds per step of one rank, without the first two steps."""
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
                           "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, __file__, "--rank", *words], stdout=subprocess.PIPE, text=True,
                         env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
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
