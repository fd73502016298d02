"""The exchange of tokens between the ranks that hold different experts (V3 §3.2): one all-to-all each way.

No token is dropped. Imports no Lightning. Another library's exchange can replace this one by a class with the
methods of `model.dispatch.Dispatcher`, called with the process group and the number of experts.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from dsv3_lightning.model.permute import Permute, Unpermute, permute, unpermute


@dataclass
class Exchange:
    """An all-to-all that may still be running. x_RD: the routed tokens received, by rank and then by expert.

    received_WE: their number by sending rank and local expert. sent, received: numbers of routed tokens by rank. x_RD
    is None once taken.
    """

    x_RD: Tensor | None
    received_WE: Tensor
    sent: list[int]
    received: list[int]

    def take(self) -> Tensor:
        """Returns the routed tokens and drops the reference: they are among the largest tensors of a step."""
        assert self.x_RD is not None
        x_RD, self.x_RD = self.x_RD, None
        return x_RD


@dataclass
class Sent:
    """Tokens in transit, and the orders that sort them by expert: order_R here, received_order_R at the receiver."""

    exchange: Exchange
    order_R: Tensor
    gates_NK: Tensor
    received_order_R: Tensor | None = None


class AllToAll:
    """The dispatcher for a group of W ranks, of which rank w holds the w-th of W equal shares of the experts.

    Every rank of the group must take part in each call.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group, self.num_experts = group, num_experts

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Sent:
        """Starts the exchange and returns before the tokens have arrived; waits only for their numbers."""
        x_RD, order_R, counts_E = permute(x_ND, experts_NK, self.num_experts)
        return Sent(self.exchange(x_RD, counts_E), order_R, gates_NK)

    def exchange(self, x_RD: Tensor, counts_E: Tensor) -> Exchange:
        """Starts the all-to-all of routed tokens that are sorted by expert."""
        ranks = self.group.size()
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        received_WE = received_E.view(ranks, -1)
        by_rank = torch.stack([tokens_by_rank(counts_E, ranks), received_WE.sum(1)])
        sent, received = by_rank.tolist()
        return Exchange(all_to_all_single_autograd(x_RD, received, sent, self.group), received_WE, sent, received)

    def receive(self, sent: Sent) -> tuple[Tensor, Tensor]:
        exchange = sent.exchange
        ranks, experts = exchange.received_WE.shape
        experts_R = (
            torch.arange(experts, device=exchange.received_WE.device)
            .repeat(ranks)
            .repeat_interleave(exchange.received_WE.flatten(), output_size=sum(exchange.received))
        )
        sent.received_order_R = experts_R.argsort(stable=True)
        return Permute.apply(exchange.take(), sent.received_order_R, 1), exchange.received_WE.sum(0).cumsum(0)

    def combine(self, y_RD: Tensor, sent: Sent) -> Tensor:
        exchange = sent.exchange
        y_RD = Unpermute.apply(y_RD, sent.received_order_R)
        y_RD = all_to_all_single_autograd(y_RD, exchange.sent, exchange.received, self.group)
        return unpermute(y_RD, sent.order_R, sent.gates_NK)


def tokens_by_rank(counts_E: Tensor, ranks: int) -> Tensor:
    """The number of routed tokens for each rank, int64 [ranks]; only ranks with some get a message."""
    return counts_E.view(ranks, -1).sum(1)
