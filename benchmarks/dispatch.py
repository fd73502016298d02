"""What a MoE layer sends between nodes, and how often the host waits for the device, with and without `deduplicate`.

python benchmarks/dispatch.py [--ranks 8] [--per-node 1] [--tokens 128]

A layer like V3's: 7,168 wide, 256 experts in as many groups as nodes, 8 experts per token in at most half of the nodes.
Routers and tokens are random. Processes exchange tokens over gloo, and what leaves a node is counted as it is sent;
`expected` follows from the routing alone. Numbers are bf16; the experts' products are left out.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.router import Router
from dsv3_lightning.parallel import dispatch, node_dispatch
from dsv3_lightning.parallel.dispatch import AllToAll
from dsv3_lightning.parallel.messages import columns
from dsv3_lightning.parallel.node_dispatch import NodeAllToAll, nodes_of

D, E, K = 7168, 256, 8


def rank_counts(per_node: int, tokens: int) -> list[dict[str, Any]]:
    """The counts of one forward and backward pass on this rank, for each dispatcher."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    nodes = ranks // per_node
    mesh = init_device_mesh("cpu", (nodes, per_node), mesh_dim_names=("across", "within"))
    config = ModelConfig(
        vocab_size=64, hidden_size=D, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=E, num_experts_per_tok=K, n_group=nodes,
        topk_group=nodes // 2, moe_intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    router = Router(config)
    torch.nn.init.normal_(router.weight, std=0.006)
    x_ND = torch.randn(tokens, D, generator=torch.Generator().manual_seed(rank)).bfloat16()
    with torch.no_grad():
        experts_NK, gates_NK, *_ = router(x_ND)
    world = dist.group.WORLD
    across, within = mesh["across"].get_group(), mesh["within"].get_group()
    away_NK = experts_NK.div(E // nodes, rounding_mode="floor") != rank // per_node
    away_nodes = nodes_of(experts_NK, E // nodes, nodes)
    away_nodes = (away_nodes >= 0) & (away_nodes != rank // per_node)
    found = []
    for name, dispatcher, rows, numbers in (
        ("direct", AllToAll(world, E), int(away_NK.sum()), 1),
        ("deduplicate", NodeAllToAll(world, E, across, within), int(away_nodes.sum()), 2 * K),
    ):
        expected = 2 * rows * (D + columns(numbers, 2))
        found.append({"name": name, "expected": expected} | counted(dispatcher, per_node, x_ND, experts_NK, gates_NK))
    return found


def counted(dispatcher: Any, per_node: int, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> dict[str, int]:
    """Bytes sent to other nodes on the way to the experts and on the way back, collectives, and waits of the host."""
    counts: Counter[str] = Counter()
    node = dist.get_rank() // per_node

    leave, exchange_numbers = dispatch.depart, dispatch.all_to_all_single

    def of_tokens(rows: Tensor, to: list[int], received: list[int], group: Any) -> Any:
        counts["of tokens"] += 1
        members = zip(dist.get_process_group_ranks(group), to, strict=True)
        away = sum(n for member, n in members if member // per_node != node)
        counts["back" if rows.shape[1] == D else "there"] += away * rows.shape[1] * rows.itemsize
        return leave(rows, to, received, group)

    def of_counts(*arguments: Any) -> Tensor:
        counts["of counts"] += 1
        return exchange_numbers(*arguments)

    tolist = Tensor.tolist

    def waiting(tensor: Tensor) -> Any:
        counts["waits"] += 1
        return tolist(tensor)

    with (
        patch.object(dispatch, "depart", of_tokens),
        patch.object(node_dispatch, "depart", of_tokens),
        patch.object(dispatch, "all_to_all_single", of_counts),
        patch.object(node_dispatch, "all_to_all_single", of_counts),
        patch.object(Tensor, "tolist", waiting),
    ):
        x_ND = x_ND.clone().requires_grad_()
        sent = dispatcher.dispatch(x_ND, experts_NK, gates_NK)
        y_RD, *_ = dispatcher.receive(sent)
        out_ND = dispatcher.combine(dispatcher.send_back(y_RD, sent))
    out_ND.float().sum().backward()
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--per-node", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="per rank")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        print(json.dumps(rank_counts(arguments.per_node, arguments.tokens)))
        dist.destroy_process_group()
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(arguments.ranks),
                           "OMP_NUM_THREADS": "1"}  # fmt: skip
    words = ["--rank", "--per-node", str(arguments.per_node), "--tokens", str(arguments.tokens)]
    processes = [
        subprocess.Popen([sys.executable, __file__, *words], env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE,
                         text=True)
        for rank in range(arguments.ranks)
    ]  # fmt: skip
    outputs = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    tokens = arguments.ranks * arguments.tokens
    print("| way | all-to-alls of tokens, of counts; waits | KB between nodes per token: expected, counted | back |")
    print("| --- | --- | --- | --- |")
    for ways in zip(*outputs, strict=True):
        one = ways[0]
        expected, there, back = (sum(way[key] for way in ways) / tokens / 1e3 for key in ("expected", "there", "back"))
        print(f"| {one['name']} | {one['of tokens']}, {one['of counts']}; {one['waits']} "
              f"| {expected:.2f}, {there:.2f} | {back:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
