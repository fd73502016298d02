"""The exchange of tokens between the ranks that hold different experts (V3 §3.2): one all-to-all each way.

No token is dropped. Imports no Lightning. Another library's exchange can take this one's place: a class with the
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
    """x_RD: the routed tokens received, by rank and then by expert, perhaps still on their way; None once taken.

    received_WE: how many of them, by sending rank and expert of this rank. sent, received: routed tokens by rank.
    """

    x_RD: Tensor | None
    received_WE: Tensor
    sent: list[int]
    received: list[int]

    def take(self) -> Tensor:
        """The routed tokens, to which nothing refers any longer: they are a step's widest tensors."""
        assert self.x_RD is not None
        x_RD, self.x_RD = self.x_RD, None
        return x_RD


@dataclass
class Sent:
    """Tokens on their way, and how to put them in order: here by order_R, at the receiver by received_order_R."""

    exchange: Exchange
    order_R: Tensor
    gates_NK: Tensor
    received_order_R: Tensor | None = None


class AllToAll:
    """The dispatcher of a group whose rank w has the w-th of equal parts of the experts.

    Every rank of the group must take part in each call.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group, self.num_experts = group, num_experts

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Sent:
        """Returns while the tokens are on their way; only their numbers are waited for."""
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
    """Routed tokens for each rank, int64 [ranks]: a message goes to those above 0."""
    return counts_E.view(ranks, -1).sum(1)
