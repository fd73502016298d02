"""The exchange of tokens between the ranks that hold different experts (V3 §3.2): one all-to-all each way.

No token is dropped. Gates travel with the tokens, so the backward pass needs neither the experts' outputs nor a second
exchange of them, also where activations are computed again. Imports no Lightning. Another library's exchange can
replace this one by a class with the methods of `model.dispatch.Dispatcher`, called with the process group and the
number of experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single

from dsv3_lightning.model.autocast import compute_dtype
from dsv3_lightning.model.permute import Order, Permute, Reorder, Unpermute, inverse, sort_by_expert
from dsv3_lightning.parallel.exchange import Flight, depart
from dsv3_lightning.parallel.messages import Pack, Unpack
from dsv3_lightning.parallel.streams import HostCopy, arrived, beside, now


class Splits(Protocol):
    """See `streams.HostCopy`."""

    arrived: torch.cuda.Event | None

    def numbers(self) -> list[int]: ...


@dataclass
class Exchange:
    """An all-to-all of routed tokens that may still be running. message: see `messages.Pack`; what is received comes by
    rank and then by expert. received_WE: its numbers by rank and local expert. order: that at the sender. arranged_R:
    the order that sorts what arrives by expert.

    message is None once taken: it is among the largest tensors of a step.
    """

    message: Flight | None
    sent: list[int]
    received: list[int]
    received_WE: Tensor
    order: Order
    arranged_R: Tensor | None = None

    def land(self) -> Tensor:
        assert self.message is not None
        message, self.message = self.message, None
        return message.land(turn=True)


@dataclass
class Sent:
    """Tokens on their way. counts_E: this rank's tokens per expert. received_WE: routed tokens by sending rank and
    local expert. splits: the numbers to each rank, and then from each. exchange: None until it starts.
    """

    counts_E: Tensor
    x_ND: Tensor
    gates_NK: Tensor
    order: Order
    received_WE: Tensor
    splits: Splits
    exchange: Exchange | None = None


@dataclass
class Returning:
    """The experts' outputs on their way back, in the order of the tokens' sender."""

    rows: Flight
    order: Order


class AllToAll:
    """The dispatcher for a group of W ranks, of which rank w holds the w-th of W equal shares of the experts.

    Every rank of the group must take part in each call.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group, self.num_experts = group, num_experts

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Sent:
        """On CUDA the tokens leave in `leave` or `receive`, when the host knows how many: what it has queued by then,
        such as the shared experts, runs during the exchange. On a CPU they leave at once."""
        order = sort_by_expert(experts_NK, self.num_experts)
        with beside(now(x_ND), order.counts_E):  # the shared experts don't wait for the numbers
            received_WE, splits = self.exchange_counts(order.counts_E, experts_NK.numel())
        sent = Sent(order.counts_E, x_ND, gates_NK, order, received_WE, splits)
        if splits.arrived is None:
            self.start(sent)
        return sent

    def exchange_counts(self, counts_E: Tensor, copies: int) -> tuple[Tensor, Splits]:
        """received_WE and splits of `Sent`. copies: an upper bound of the routed tokens."""
        ranks = self.group.size()
        received_WE = all_to_all_single(counts_E, None, None, self.group).view(ranks, -1)
        return received_WE, HostCopy(torch.cat([tokens_by_rank(counts_E, ranks), received_WE.sum(1)]))

    def start(self, sent: Sent) -> None:
        numbers, ranks = sent.splits.numbers(), self.group.size()
        with beside(sent.splits.arrived, sent.x_ND, sent.gates_NK, *sent.order):
            x_ND = sent.x_ND.to(compute_dtype(sent.x_ND))
            sent.exchange = self.exchange(
                x_ND, sent.gates_NK, sent.order, numbers[:ranks], numbers[ranks:], sent.received_WE
            )

    def leave(self, sent: Sent) -> None:
        if sent.exchange is None:
            self.start(sent)

    def receive(self, sent: Sent) -> tuple[Tensor, Tensor, Tensor]:
        self.leave(sent)
        assert sent.exchange is not None
        return self.arrange(sent.exchange)

    def send_back(self, y_RD: Tensor, sent: Sent) -> Returning:
        assert sent.exchange is not None
        return self.exchange_back(y_RD, sent.exchange)

    def combine(self, returning: Returning) -> Tensor:
        return Unpermute.apply(returning.rows.land(turn=True), returning.order.order_R, returning.order.rows_NK)

    def exchange(
        self, x_ND: Tensor, gates_NK: Tensor, order: Order, sent: list[int], received: list[int], received_WE: Tensor
    ) -> Exchange:
        """Starts the all-to-all of tokens with their gates, fp32."""
        order = order._replace(order_R=order.order_R[: sum(sent)])
        gates_R1 = Permute.apply(gates_NK.reshape(-1, 1), order.order_R, order.rows_NK.view(-1, 1))
        message = Pack.apply(x_ND, gates_R1, order.order_R, order.rows_NK)
        flight = depart(message, sent, received, self.group)
        return Exchange(flight, sent, received, received_WE, order)

    def arrange(self, exchange: Exchange) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `Experts`, when the tokens have arrived."""
        message = exchange.land()
        received_WE = arrived(exchange.received_WE)  # the message left after these numbers had come
        order_R = exchange.arranged_R = order_of_arrival(received_WE, sum(exchange.received))
        x_RD, gates_R1 = Unpack.apply(message, 1, order_R, inverse(order_R))
        return x_RD, received_WE.sum(0).cumsum(0), gates_R1.squeeze(1)

    def exchange_back(self, y_RD: Tensor, exchange: Exchange) -> Returning:
        """Starts the all-to-all of the experts' outputs."""
        assert exchange.arranged_R is not None
        y_RD = Reorder.apply(y_RD, inverse(exchange.arranged_R), exchange.arranged_R)
        return Returning(depart(y_RD, exchange.received, exchange.sent, self.group), exchange.order)


def tokens_by_rank(counts_E: Tensor, ranks: int) -> Tensor:
    """The number of routed tokens for each rank, int64 [ranks]; only ranks with some get a message."""
    return counts_E.view(ranks, -1).sum(1)


def order_of_arrival(received_WE: Tensor, total: int) -> Tensor:
    """The order that sorts `total` rows, which come by rank and then by expert, by expert and then by rank: int64.

    >>> order_of_arrival(torch.tensor([[1, 2], [2, 0]]), 5).tolist()  # of expert 0: row 0, and 3 and 4 of rank 1
    [0, 3, 4, 1, 2]
    """
    ends_WE = received_WE.flatten().cumsum(0).view_as(received_WE)
    arranged_EW = received_WE.T.contiguous()
    arranged_ends_EW = arranged_EW.flatten().cumsum(0).view_as(arranged_EW)
    shift_EW = ends_WE.T - arranged_ends_EW  # both minus their sizes are where a block starts
    shift_R = shift_EW.flatten().repeat_interleave(arranged_EW.flatten(), output_size=total)
    return torch.arange(total, device=received_WE.device) + shift_R
