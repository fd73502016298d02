"""Tokens travel to the ranks of their experts and back (V3 §3.2): one all-to-all each way, no token dropped.

Imports no Lightning. Another library's exchange can take this one's place: a class with the same two methods.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from dsv3_lightning.model.experts import Combine, Dispatch


@dataclass
class Sent:
    """x_RD: R slots received, by sending rank and then by expert, perhaps still on their way; None once taken.

    received_PE: how many of them, by sending rank and own expert. sent, received: slots by rank.
    """

    x_RD: Tensor | None
    received_PE: Tensor
    sent: list[int]
    received: list[int]

    def take(self) -> Tensor:
        """The slots, which nobody holds any longer: a layer's slots are the widest tensors of a step."""
        assert self.x_RD is not None
        x_RD, self.x_RD = self.x_RD, None
        return x_RD


class AllToAll:
    """Rank p of the group has the p-th of equal parts of the experts. Every rank of the group must take part."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def send(self, x_SD: Tensor, counts_E: Tensor) -> Sent:
        """Returns while the slots are on their way; only their numbers are waited for."""
        ranks = self.group.size()
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        received_PE = received_E.view(ranks, -1)
        by_rank = torch.stack([slots_by_rank(counts_E, ranks), received_PE.sum(1)])
        sent, received = by_rank.tolist()
        x_RD = all_to_all_single_autograd(x_SD, received, sent, self.group)
        return Sent(x_RD, received_PE, sent, received)

    def collect(self, sent: Sent, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ranks, experts = sent.received_PE.shape
        own_E = torch.arange(experts, device=sent.received_PE.device).repeat(ranks)
        slots = sent.received_PE.flatten()
        order = own_E.repeat_interleave(slots, output_size=sum(sent.received)).argsort(stable=True)
        ends_E = sent.received_PE.sum(0).cumsum(0)
        y_RD = Combine.apply(compute(Dispatch.apply(sent.take(), order, 1), ends_E), order)
        return all_to_all_single_autograd(y_RD, sent.sent, sent.received, self.group)


def slots_by_rank(counts_E: Tensor, ranks: int) -> Tensor:
    """Slots for each rank, int64 [ranks]: a message goes to those above 0."""
    return counts_E.view(ranks, -1).sum(1)
