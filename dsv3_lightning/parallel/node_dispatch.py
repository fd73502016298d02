"""The exchange of tokens over several nodes, where a token travels to each node once (V3 §3.2.2).

In the first stage a token goes to the rank with the same place in every node that has one of its experts; in the second
that rank sends a copy to each of these experts, as `dispatch.AllToAll` does. On the way back each node adds up its
experts' weighted outputs, so that one row per token and node returns. With routing limited to M of a layer's nodes a
token thus crosses at most M times each way, where K experts would make it up to K times.

Sums are fp32; a node's sum is rounded to the dtype of the matrix products once, for the way back. Every number of rows
follows from one exchange of counts, so the host waits for the device no more often than without nodes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single

from dsv3_lightning.model.autocast import compute_dtype
from dsv3_lightning.model.permute import Order, Permute, Unpermute, count, sort_by_expert
from dsv3_lightning.parallel.dispatch import AllToAll, Exchange, Returning, tokens_by_rank
from dsv3_lightning.parallel.exchange import Flight, depart
from dsv3_lightning.parallel.messages import Pack, Unpack
from dsv3_lightning.parallel.streams import HostCopy, beside, now


class Plan(NamedTuple):
    """The numbers of rows of both stages, by node and by rank of this node. forwarded_WE: routed tokens for this rank's
    experts, by the rank of this node that forwards them. splits: to_nodes, from_nodes, to_ranks, from_ranks."""

    forwarded_WE: Tensor
    splits: HostCopy


@dataclass
class Crossing:
    """Tokens on their way between nodes. counts_E: this rank's tokens per expert. order: of the tokens' copies, one for
    each node; row r is copy n · nodes + node. message: None until it leaves, and once it is taken. exchange: the second
    stage, once it starts."""

    counts_E: Tensor
    x_ND: Tensor
    experts_NK: Tensor
    gates_NK: Tensor
    order: Order
    plan: Plan
    to_nodes: list[int]
    from_nodes: list[int]
    to_ranks: list[int]
    from_ranks: list[int]
    message: Flight | None = None
    exchange: Exchange | None = None


class NodeAllToAll:
    """The dispatcher for a group of ranks that fill nodes one after the other.

    across: the group of the ranks with this rank's place in each node, in the order of the nodes. within: the group of
    the ranks of this node. Every rank of the group must take part in each call.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_experts: int, across: dist.ProcessGroup, within: dist.ProcessGroup
    ) -> None:
        self.group, self.num_experts, self.across = group, num_experts, across
        self.nodes, self.experts_per_node = across.size(), num_experts // across.size()
        self.within = AllToAll(within, self.experts_per_node)

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Crossing:
        """Starts the first stage as `AllToAll.dispatch` does."""
        order = sort_by_expert(nodes_of(experts_NK, self.experts_per_node, self.nodes), self.nodes)
        counts_E = count(experts_NK % (self.num_experts + 1), self.num_experts + 1)[:-1]
        with beside(now(x_ND), counts_E, order.counts_E):  # the shared experts don't wait for the numbers
            plan = self.exchange_counts(counts_E, order.counts_E)
        sent = Crossing(counts_E, x_ND, experts_NK, gates_NK, order, plan, [], [], [], [])
        if plan.splits.arrived is None:
            self.start(sent)
        return sent

    def exchange_counts(self, counts_E: Tensor, tokens_by_node: Tensor) -> Plan:
        """Every rank tells all others its tokens by expert and by node."""
        ranks, node, place = self.within.group.size(), self.across.rank(), self.within.group.rank()
        mine = torch.cat([counts_E, tokens_by_node])
        known = all_to_all_single(mine.repeat(self.group.size()), None, None, self.group)
        by_expert, by_node = known.view(self.nodes, ranks, -1).split([self.num_experts, self.nodes], -1)
        own = slice(node * self.experts_per_node, (node + 1) * self.experts_per_node)
        forwarded_WE = by_expert[..., own].sum(0)  # by place: a rank forwards what those of its place sent to this node
        to_ranks = tokens_by_rank(forwarded_WE[place], ranks)
        forwarded_WE = forwarded_WE.view(ranks, ranks, -1)[:, place]
        splits = torch.cat([by_node[node, place], by_node[:, place, node], to_ranks, forwarded_WE.sum(1)])
        return Plan(forwarded_WE, HostCopy(splits))

    def start(self, sent: Crossing) -> None:
        """Starts the first stage; on CUDA also queues the second behind it."""
        numbers, nodes, ranks = sent.plan.splits.numbers(), self.nodes, self.within.group.size()
        sent.to_nodes, sent.from_nodes = numbers[:nodes], numbers[nodes : 2 * nodes]
        sent.to_ranks, sent.from_ranks = numbers[2 * nodes : -ranks], numbers[-ranks:]
        leave = sent.plan.splits.arrived
        with beside(leave, sent.x_ND, sent.experts_NK, sent.gates_NK, *sent.order, sent.plan.forwarded_WE):
            order = sent.order = sent.order._replace(order_R=sent.order.order_R[: sum(sent.to_nodes)])
            gates_RK = Permute.apply(sent.gates_NK, order.order_R, order.rows_NK)
            numbers_RC = torch.cat([gates_RK, self.local_experts(sent.experts_NK, order.order_R)], 1)
            x_ND = sent.x_ND.to(compute_dtype(sent.x_ND))
            message = Pack.apply(x_ND, numbers_RC, order.order_R, order.rows_NK)
            sent.message = depart(message, sent.to_nodes, sent.from_nodes, self.across)
            if leave is not None:
                self.forward(sent)

    def local_experts(self, experts_NK: Tensor, order_R: Tensor) -> Tensor:
        """For each row the experts at its node, by their number there, and -1 for the others: fp32 [R, K]."""
        node_R = order_R % self.nodes
        local_RK = experts_NK.index_select(0, order_R // self.nodes) - node_R[:, None] * self.experts_per_node
        return local_RK.masked_fill((local_RK < 0) | (local_RK >= self.experts_per_node), -1).float()

    def forward(self, sent: Crossing) -> None:
        """Starts the second stage, when the first has arrived."""
        assert sent.message is not None
        K = sent.gates_NK.shape[1]
        message, sent.message = sent.message, None
        x_ND, numbers_NC = Unpack.apply(message.land(), 2 * K)
        gates_NK, experts_NK = numbers_NC.split(K, 1)
        order = sort_by_expert(experts_NK.detach().long(), self.experts_per_node)
        sent.exchange = self.within.exchange(
            x_ND, gates_NK, order, sent.to_ranks, sent.from_ranks, sent.plan.forwarded_WE
        )

    def leave(self, sent: Crossing) -> None:
        if sent.message is None and sent.exchange is None:
            self.start(sent)

    def receive(self, sent: Crossing) -> tuple[Tensor, Tensor, Tensor]:
        self.leave(sent)
        if sent.exchange is None:
            self.forward(sent)
        assert sent.exchange is not None
        return self.within.arrange(sent.exchange)

    def send_back(self, y_RD: Tensor, sent: Crossing) -> Returning:
        """Adds up the outputs of this node's experts, and starts the way back between nodes."""
        assert sent.exchange is not None and sent.exchange.arranged_R is not None
        with beside(now(y_RD), y_RD, sent.exchange.arranged_R):
            back = self.within.exchange_back(y_RD, sent.exchange)
            sums_ND = Unpermute.apply(back.rows.land(), back.order.order_R, back.order.rows_NK)
            back_RD = depart(sums_ND, sent.from_nodes, sent.to_nodes, self.across)
        return Returning(back_RD, sent.order)

    def combine(self, returning: Returning) -> Tensor:
        return Unpermute.apply(returning.rows.land(turn=True), returning.order.order_R, returning.order.rows_NK)


def nodes_of(experts_NK: Tensor, experts_per_node: int, nodes: int) -> Tensor:
    """For each token and node the node's number, or -1 if none of the token's experts is there: int64 [N, nodes].

    >>> nodes_of(torch.tensor([[5, 4], [0, 5], [-1, -1]]), 2, 3).tolist()
    [[-1, -1, 2], [0, -1, 2], [-1, -1, -1]]
    """
    there = torch.zeros(len(experts_NK), nodes + 1, dtype=torch.bool, device=experts_NK.device)
    there.scatter_(1, experts_NK.div(experts_per_node, rounding_mode="floor") % (nodes + 1), True)
    return torch.arange(nodes, device=experts_NK.device).where(there[:, :nodes], -1)
