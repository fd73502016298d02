"""What travels in a step: parameters and gradients in rings, routed tokens in all-to-alls. Bytes, and seconds."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.hardware import Hardware
from dsv3_lightning.planning.layout import Layout
from dsv3_lightning.planning.matrices import sharded_numbers
from dsv3_lightning.planning.parts import COMPUTE, COMPUTING, Part, Ways, part, share_of
from dsv3_lightning.planning.share import share_parameters

EXCHANGE = "tokens to experts and back"
EXCHANGE_FIRST = "tokens to experts, beside the shared ones"
TILE = 128  # numbers with one scale in FP8, which has 4 bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives per step. tokens_inside, tokens_between: within a node and from other nodes.

    host: with offloading, parameters from the host's memory and gradients to it.
    """

    parameters: float
    replicas: float
    tokens_inside: float
    tokens_between: float
    host: float

    @property
    def tokens(self) -> float:
        return self.tokens_inside + self.tokens_between


class Copies(NamedTuple):
    """How many rows a token sends on average, within a node and between nodes."""

    inside: float
    between: float


def chosen(of: int, choices: int) -> float:
    """How many of `of` targets independent choices hit, on average."""
    return of * (1 - (1 - 1 / of) ** choices)


def copies(model: ModelConfig, ep: int, per_node: int, exchange: str) -> Copies:
    """Rows per token of an exchange. `direct`: one per expert. `by_node`: one per node, then one per expert.
    `fused`: one per node, then one per rank.

    With groups of experts, one for each node of the ep ranks, a token goes to `topk_group` nodes (V3 §2.1.2); without,
    to as many as its experts happen to be on.
    """
    K, here = model.num_experts_per_tok, min(ep, per_node)
    nodes = max(1, ep // per_node)
    if ep == 1:
        return Copies(0, 0)
    on_nodes = min(model.topk_group, K) if model.n_group == nodes > 1 else chosen(nodes, K)
    elsewhere = (nodes - 1) / nodes
    if exchange == "direct":
        return Copies(K * (1 / nodes - 1 / ep), K * elsewhere)
    arriving = K if exchange == "by_node" else on_nodes * chosen(here, math.ceil(K / on_nodes))
    return Copies(arriving * (here - 1) / here, on_nodes * elsewhere if nodes > 1 else 0)


def traffic(model: ModelConfig, hardware: Hardware, layout: Layout) -> Traffic:
    """Bytes of ring collectives, (n - 1)/n of the whole per rank, and of all-to-alls of routed tokens."""
    shape, work, code, share = layout.mesh, layout.work, layout.code, share_of(model, layout)
    dense, routed = share_parameters(model, share)
    n, m, r = shape.dp_shard, shape.expert_shard, shape.dp_replicate
    times = gathers(layout)
    per_pass = work.computed * times.gathered + code.gradient * times.reduced
    parameters = per_pass * (dense * (n - 1) / n + routed / shape.ep * (m - 1) / m)
    reductions = 1 if code.reduce_once or code.zero1 else work.micro_batches
    replicas = reductions * 2 * (r - 1) / r * code.gradient * (dense + routed) / n
    found = copies(model, shape.ep, hardware.gpu.per_node, code.exchange)
    rows = sum(exchange_bytes(layout)) * work.tokens * work.micro_batches * share.moe_layers * model.hidden_size
    host = 0.0
    if layout.strategy.cpu_offload:
        host = 4 * (times.gathered + times.reduced) * (dense + routed) / n
    return Traffic(parameters, replicas, rows * found.inside, rows * found.between, host)


class Gathers(NamedTuple):
    """How often a step gathers all parameters, and how often it reduces all gradients."""

    gathered: int
    reduced: int


def gathers(layout: Layout) -> Gathers:
    if layout.code.zero1:
        return Gathers(1, 1)
    each = layout.work.micro_batches
    return Gathers(each * (2 if layout.strategy.reshard_after_forward else 1), each)


class Exchanges(NamedTuple):
    """Of the all-to-alls of tokens of a MoE layer and a micro-batch. A sum over them, by pass.

    first: beside the shared experts: to the experts, forward and where it is repeated. Others are exposed.
    """

    forward_first: float
    forward_others: float
    backward_first: float
    backward_others: float


def exchanges(layout: Layout) -> Exchanges:
    """How many there are: there and back, their gradients, and what is sent again."""
    again = layout.again.exchange
    return Exchanges(1, 1, bool(again), 2 + max(0, again - 1))


def exchange_bytes(layout: Layout) -> Exchanges:
    """Bytes per number that each sends. With FP8 tokens, and the gradients of what comes back, travel in it: one byte,
    and four for each tile of 128 (V3 §3.3.2)."""
    wide, counts = layout.work.computed, exchanges(layout)
    tiles = layout.code.fp8
    tile = 1 + 4 / TILE if tiles and tiles.dispatch else wide
    backward = tile + (counts.backward_others - 1) * wide
    return Exchanges(counts.forward_first * tile, wide, counts.backward_first * tile, backward)


def neighbors(layout: Layout, hardware: Hardware) -> tuple[int, int]:
    """Ranks of one node in the ring of dense parameters, and in that of experts, whose ranks are `ep` apart."""
    shape, per_node = layout.mesh, hardware.gpu.per_node
    dense = min(shape.dp_shard, per_node)
    return dense, max(1, min(shape.expert_shard, dense // shape.ep))


def exchange(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Tokens to their experts and back. The first exchange of a pass runs while the shared experts compute."""
    moe, shape, code, work = share_of(model, layout).moe_layers, layout.mesh, layout.code, layout.work
    if not moe or shape.ep == 1:
        return []
    kind = "exchange.fused" if code.exchange == "fused" else "exchange"
    moved = traffic(model, hardware, layout)
    inside = moved.tokens_inside * layout.imbalance / hardware.link("inside", kind)
    between = moved.tokens_between * layout.imbalance / hardware.link("between", kind)
    spread = shape.ep > hardware.gpu.per_node
    # `direct` sends over both links at once, the kernels of `fused` forward as rows arrive, `by_node` goes step by step
    seconds = inside + between if code.exchange == "by_node" else max(inside, between)
    moving = [seconds * each / sum(exchange_bytes(layout)) for each in exchange_bytes(layout)]
    start = hardware.rate("collective.start") + (shape.ep - 1) * hardware.rate("exchange.peer")
    start *= moe * work.micro_batches
    stages = 2 if code.exchange == "by_node" and spread else 1
    count, again = exchanges(layout), bool(layout.again.exchange)
    forward = (stages * (count.forward_first + count.forward_others) + code.counted) * start
    backward = (stages * (count.backward_first + count.backward_others) + again * code.counted) * start
    others = Ways(moving[1] + forward, moving[3] + backward, 0.0)
    first = Ways(moving[0], moving[2], 0.0)
    names = tuple(f"{kind}.{where}" for where in (("inside", "between") if spread else ("inside",)))
    names += ("collective.start", "exchange.peer")
    if code.exchange_hidden:
        both = Ways(*(a + b for a, b in zip(first, others, strict=True)))
        return [part(EXCHANGE, both, names, COMPUTING)]
    return [part(EXCHANGE, others, names), part(EXCHANGE_FIRST, first, names, ("shared experts",))]


def parameters(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Gathers of parameters and reductions of gradients, beside the computing, and the copies around them."""
    shape, work, share = layout.mesh, layout.work, share_of(model, layout)
    dense, routed = share_parameters(model, share)
    times, near = gathers(layout), neighbors(layout, hardware)
    per_pass = work.computed * times.gathered + layout.code.gradient * times.reduced
    found: list[Part] = []
    seconds, names = 0.0, ("ring.inside", "ring.between", "hop.inside", "hop.between", "collective.start")
    for numbers, ranks, beside, units in (
        (dense, shape.dp_shard, near[0], share.layers + 3),
        (routed / shape.ep, shape.expert_shard, near[1], share.moe_layers),
    ):
        if ranks > 1 and numbers:
            seconds += per_pass * numbers * (ranks - 1) / ranks / hardware.ring_rate(ranks, beside)
            seconds += (times.gathered + times.reduced) * units * hardware.ring_latency(ranks, beside)
    if seconds:
        found.append(Part("parameters gathered, gradients reduced", seconds, COMPUTING, names))
        # copied out of the buffer of a gather, cast to fp32 and into the buffer of a reduction
        moved = 2 * work.computed * times.gathered + (work.computed + 4) * times.reduced
        copying = moved * (dense + routed / shape.ep) / hardware.memory_rate
        found.append(Part("copies around gathers", copying, (), ("memory.share",)))
        # of each micro-batch the first gather and the last reduction have nothing to hide under
        ends = 1 if layout.code.zero1 else work.micro_batches
        edge = ends * seconds / (times.gathered + times.reduced) * 2 / (share.layers + 3)
        found.append(Part("first gather and last reduction", edge, (), names))
    return found


def replicas(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Gradients added over the copies of the model: a ring over nodes for each rank of a node."""
    shape, moved = layout.mesh, traffic(model, hardware, layout).replicas
    if shape.dp_replicate == 1:
        return []
    beside = max(1, min(hardware.gpu.per_node // min(shape.dp_shard, hardware.gpu.per_node), shape.dp_replicate))
    reductions = 1 if layout.code.reduce_once or layout.code.zero1 else layout.work.micro_batches
    latency = 2 * reductions * (share_of(model, layout).layers + 3) * hardware.ring_latency(shape.dp_replicate, beside)
    seconds = moved / hardware.ring_rate(shape.dp_replicate, beside) + latency
    names = ("ring.inside", "ring.between", "hop.inside", "hop.between", "collective.start")
    return [Part("gradients between copies of the model", seconds, COMPUTING, names)]


def offloading(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    moved = traffic(model, hardware, layout).host
    if not moved:
        return []
    rate = hardware.gpu.host * hardware.rate("host.pcie")
    return [Part("parameters from the host, gradients to it", moved / rate, COMPUTING, ("host.pcie",))]


def whole_matrices(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Shards of Muon's matrices to the ranks that orthogonalize them, and back."""
    shape, work = layout.mesh, layout.work
    if work.kind != "muon" or layout.strategy.cpu_offload:
        return []
    inside = between = 0.0
    numbers = sharded_numbers(model, share_of(model, layout), shape.dp_shard, shape.ep, shape.expert_shard)
    for each, ranks, near in zip(numbers, (shape.dp_shard, shape.expert_shard), neighbors(layout, hardware)):
        moved = 2 * work.computed * each
        inside += moved * (near - 1) / ranks
        between += moved * (ranks - near) / ranks
    if not inside + between:
        return []
    seconds = max(inside / hardware.link("inside", "exchange"), between / hardware.link("between", "exchange"))
    names = ("exchange.inside", *(("exchange.between",) if between else ()))
    return [Part("matrices to their owners and back", seconds, (), names)]


WIRES = (exchange, parameters, replicas, offloading, whole_matrices)


def parts(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """All parts of a step: what computes first, then what travels."""
    return [part for each in (*COMPUTE, *WIRES) for part in each(model, hardware, layout)]
