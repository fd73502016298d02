"""Expert placement for serving: replicas of the most loaded experts, packed so that GPUs have equal loads (V3 §3.4).

First each replica of a layer goes to the expert with the highest load per replica. Then replicas are packed onto GPUs,
equally many on each: the heaviest first, each onto the least loaded GPU with room. If nodes divide the router's groups,
whole groups are first packed onto nodes, and the rest happens within nodes, so a token that is limited to few groups
visits few nodes. This is the policy of the published load balancer (EPLB). Finally replicas are swapped between the
most loaded GPU and the others, as long as that lowers the maximum.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.errors import ConfigError


class Placement(NamedTuple):
    """The placement of the physical experts of L layers, which are the E experts and their replicas: int64.

    physical_to_logical [L, physical]: the expert at each position; GPUs have equal ranges of positions.
    logical_to_physical [L, E, most replicas]: each expert's positions, padded with -1. expert_count [L, E]: how many.
    """

    physical_to_logical: Tensor
    logical_to_physical: Tensor
    expert_count: Tensor


def rebalance_experts(weight: Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Placement:
    """Places experts by load. weight [L, E]: tokens per expert, or any load. num_replicas: R, over all GPUs.

    If num_nodes divides num_groups, a group's experts stay on one node; one group and one node give the most even
    placement, without such limits. Raises ConfigError.
    """
    load_LE = weight.detach().double().cpu()
    check(load_LE, num_replicas, num_groups, num_nodes, num_gpus)
    hierarchical = num_groups % num_nodes == 0
    groups, nodes = (num_groups, num_nodes) if hierarchical else (1, 1)
    placed = [place_layer(load_E.tolist(), num_replicas, groups, nodes, num_gpus) for load_E in load_LE]
    return tables(torch.tensor(placed), load_LE.shape[1])


def place_layer(load: list[float], replicas: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """The expert at each of R positions, GPU by GPU, node by node.

    More even nodes may be harder to divide among GPUs, so both ways are tried, and the lower maximum load wins.
    """
    size = len(load) // groups
    group_loads = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    greedy = pack(group_loads, nodes)
    plans = []
    for groups_of_nodes in (greedy, even_out(greedy, group_loads)):
        places: list[int] = []
        busiest = 0.0
        for node_groups in groups_of_nodes:
            experts = [g * size + i for g in node_groups for i in range(size)]
            counts = replicate([load[e] for e in experts], replicas // nodes)
            physical = [expert for expert, count in zip(experts, counts) for _ in range(count)]
            shares = [load[expert] / count for expert, count in zip(experts, counts) for _ in range(count)]
            for gpu in even_out(pack(shares, gpus // nodes), shares):
                places += [physical[i] for i in gpu]
                busiest = max(busiest, sum(shares[i] for i in gpu))
        plans.append((busiest, places))
    return min(plans, key=lambda plan: plan[0])[1]


def replicate(load: list[float], replicas: int) -> list[int]:
    """The number of copies of each expert: one, plus replicas where the load per copy is highest."""
    counts = [1] * len(load)
    for _ in range(replicas - len(load)):
        largest = max(range(len(load)), key=lambda e: load[e] / counts[e])
        counts[largest] += 1
    return counts


def pack(weights: list[float], packs: int) -> list[list[int]]:
    """Packs items, equally many in each: the heaviest first, each into the lightest pack with room."""
    room = len(weights) // packs
    content: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        open_packs = [p for p in range(packs) if len(content[p]) < room]
        lightest = min(open_packs, key=total.__getitem__)
        content[lightest].append(item)
        total[lightest] += weights[item]
    return content


def even_out(packs: list[list[int]], weights: list[float]) -> list[list[int]]:
    """Swaps items of the heaviest pack for lighter ones, as long as that lowers the maximum of the two packs.

    >>> even_out([[0, 2, 4], [1, 3, 5]], [7.0, 7.0, 5.0, 5.0, 5.0, 1.0])
    [[3, 2, 4], [1, 0, 5]]
    """
    packs = [list(items) for items in packs]
    while True:
        total = [sum(weights[i] for i in items) for items in packs]
        heaviest = max(range(len(packs)), key=total.__getitem__)
        swaps = [
            (max(total[heaviest] - less, total[p] + less), at, p, there)
            for at, item in enumerate(packs[heaviest])
            for p, items in enumerate(packs)
            for there, other in enumerate(items)
            if (less := weights[item] - weights[other]) > 0 and total[p] + less < total[heaviest]
        ]
        heavier, at, p, there = min(swaps, default=(total[heaviest], 0, 0, 0))
        if heavier >= total[heaviest] * (1 - 1e-9):  # no gain beyond rounding
            return packs
        packs[heaviest][at], packs[p][there] = packs[p][there], packs[heaviest][at]


def tables(physical: Tensor, num_experts: int) -> Placement:
    layers, replicas = physical.shape
    count_LE = torch.zeros(layers, num_experts, dtype=torch.int64)
    count_LE.scatter_add_(1, physical, torch.ones_like(physical))
    logical = torch.full((layers, num_experts, int(count_LE.max())), -1)
    for layer in range(layers):
        seen = [0] * num_experts
        for place, expert in enumerate(physical[layer].tolist()):
            logical[layer, expert, seen[expert]] = place
            seen[expert] += 1
    return Placement(physical, logical, count_LE)


def gpu_loads(weight: Tensor, placement: Placement, num_gpus: int) -> Tensor:
    """Load of each GPU, [L, GPUs] fp64, with an expert's tokens divided evenly among its replicas."""
    share_LE = weight.double() / placement.expert_count
    return share_LE.gather(1, placement.physical_to_logical).unflatten(1, (num_gpus, -1)).sum(-1)


def loads_in_order(weight: Tensor, num_gpus: int) -> Tensor:
    """Load of each GPU, [L, GPUs] fp64, without replicas: experts in order, as equally many on each as possible."""
    layers, experts = weight.shape
    gpu_E = torch.arange(experts) * num_gpus // experts
    return torch.zeros(layers, num_gpus, dtype=torch.float64).index_add_(1, gpu_E, weight.double())


def overload(loads_LG: Tensor) -> Tensor:
    """Load of the busiest GPU over the mean, [L]; 1 is balance, also for no load at all."""
    mean_L = loads_LG.mean(1)
    return torch.where(mean_L > 0, loads_LG.amax(1) / mean_L, 1.0)


def check(load_LE: Tensor, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    if load_LE.dim() != 2 or not load_LE.numel():
        raise ConfigError(f"weight: is {list(load_LE.shape)}, must be [layers, experts]")
    if not torch.isfinite(load_LE).all() or (load_LE < 0).any():
        raise ConfigError("weight: must be finite and at least 0")
    experts = load_LE.shape[1]
    for name, value in (("gpus", gpus), ("nodes", nodes), ("groups", groups)):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    for name, value, of, whole in (
        ("groups", groups, "experts", experts),
        ("nodes", nodes, "gpus", gpus),
        ("gpus", gpus, "replicas", replicas),
    ):
        if whole % value:
            raise ConfigError(f"{name}={value}: does not divide {of}={whole}")
    if replicas < experts:
        raise ConfigError(f"replicas={replicas}: must be at least the number of experts, {experts}")
