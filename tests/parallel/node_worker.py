"""Four ranks as two nodes of two: a token travels to each node once.

python -m tests.parallel.node_worker, under a launcher's environment. Held against all experts in one process, and
against the exchange without nodes; bytes between nodes are counted as they are sent.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _get_work_registry_size
from torch.distributed.device_mesh import init_device_mesh

from dsv3_lightning.model.moe import MoE
from dsv3_lightning.parallel import dispatch, node_dispatch
from dsv3_lightning.parallel.dispatch import AllToAll
from dsv3_lightning.parallel.exchange import Flight
from dsv3_lightning.parallel.messages import columns
from dsv3_lightning.parallel.node_dispatch import NodeAllToAll
from tests.parallel.counting import check_costs
from tests.parallel.small import EXPERTS, D, K, config, tokens_and_choices

NODES, PLACES = 2, 2
CASES = ("uneven", "one expert", "no tokens on rank 0", "no tokens for rank 0", "padding", "one node", "crossed")
COSTS = {  # per layer, of the forward and of the backward pass with what it computes again: all-to-alls, and waits
    "none": ((5, 1), (4, 0)),
    "selective": ((5, 1), (4, 1)),
    "full": ((5, 1), (7, 1)),  # numbers and both stages again, but not the way back
}


def layers() -> tuple[MoE, MoE, MoE]:
    """All experts; and this rank's, with the exchange that knows nodes and with the one that doesn't."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = MoE(config(n_shared_experts=1))
    for weight in whole.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    mesh = init_device_mesh("cpu", (NODES, PLACES), mesh_dim_names=("across", "within"))
    parts = []
    share = EXPERTS // ranks
    for dispatcher in (
        NodeAllToAll(dist.group.WORLD, EXPERTS, mesh["across"].get_group(), mesh["within"].get_group()),
        AllToAll(dist.group.WORLD, EXPERTS),
    ):
        part = MoE(whole.config)
        part.load_state_dict(whole.state_dict())
        for name, weight in whole.experts.named_parameters():
            own = weight.detach()[rank * share : (rank + 1) * share].clone()
            setattr(part.experts, name, torch.nn.Parameter(own))
        part.dispatcher = dispatcher
        parts.append(part)
    return whole, *parts


def computed(moe: MoE, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> list[Tensor]:
    """Output, and gradients of tokens, gates and experts."""
    x_ND, gates_NK = x_ND.clone().requires_grad_(), gates_NK.clone().requires_grad_()
    moe.zero_grad()
    sent = moe.dispatcher.dispatch(x_ND, experts_NK, gates_NK)
    y_RD = moe.experts(*moe.dispatcher.receive(sent))
    out_ND = moe.dispatcher.combine(moe.dispatcher.send_back(y_RD, sent))
    out_ND.square().sum().backward()
    weights = [torch.zeros_like(w) if w.grad is None else w.grad for w in moe.experts.parameters()]
    return [out_ND.detach(), x_ND.grad, gates_NK.grad, *weights]


def check(case: str, whole: MoE, nodes: MoE, direct: MoE) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs = [tokens_and_choices(case, r) for r in range(ranks)]
    everything = computed(whole, *(torch.cat(parts) for parts in zip(*inputs, strict=True)))
    start = sum(len(inputs[r][0]) for r in range(rank))
    own, share = slice(start, start + len(inputs[rank][0])), slice(rank * 2, rank * 2 + 2)
    expected = [values[own if i < 3 else share] for i, values in enumerate(everything)]
    with bytes_between_nodes() as by_node:
        found = computed(nodes, *inputs[rank])
    with bytes_between_nodes() as straight:
        found_directly = computed(direct, *inputs[rank])
    for one, two, three in zip(expected, found, found_directly, strict=True):
        for other in (one, three):
            assert two.shape == other.shape and (two - other).norm() <= 2e-6 * other.norm(), case
    # There and back, and the gradients of both: a row for each of a token's experts, or for each of their nodes.
    other = 1 - rank // PLACES
    away_NK = inputs[rank][1].div(EXPERTS // NODES, rounding_mode="floor") == other
    rows, tokens = int(away_NK.sum()), int(away_NK.any(1).sum())
    assert straight["there"] == 4 * rows * (D + columns(1, 4)), case
    assert by_node["there"] == 4 * tokens * (D + columns(2 * K, 4)), case
    totals = torch.tensor([by_node["back"], straight["back"], tokens, rows])
    dist.all_reduce(totals)
    assert totals[:2].tolist() == [4 * D * n for n in totals[2:].tolist()], case
    assert _get_work_registry_size() == 0, "a collective that nobody has waited for"


@contextmanager
def bytes_between_nodes() -> Iterator[dict[str, int]]:
    """What this rank sends to another node in the forward pass, with tokens or with experts' outputs."""
    sent = {"there": 0, "back": 0}
    leave = dispatch.depart
    node, ranks = dist.get_rank() // PLACES, dist.get_world_size()

    def counted(rows: Tensor, to: list[int], received: list[int], group: Any) -> Flight:
        members = dist.get_process_group_ranks(group)
        away = sum(n for member, n in zip(members, to, strict=True) if member // PLACES != node)
        sent["back" if rows.shape[1] == D else "there"] += away * rows.shape[1] * rows.itemsize
        return leave(rows, to, received, group)

    assert ranks == NODES * PLACES
    with (
        patch.object(dispatch, "depart", counted),
        patch.object(node_dispatch, "depart", counted),
    ):
        yield sent


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    models = layers()
    for case in CASES:
        check(case, *models)
    check_costs(models[1], COSTS)
    del models
    gc.collect()  # the group ends when nothing has it any more; its threads must not outlive the interpreter
    dist.destroy_process_group()
