"""One rank of a MoE layer's experts, spread over all ranks, held against all of them in one process.

python -m tests.parallel.dispatch_worker, under a launcher's environment.
"""

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _get_work_registry_size
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.router import Router
from dsv3_lightning.parallel.dispatch import AllToAll, Exchange, Sent
from tests.parallel.counting import check_costs
from tests.parallel.small import EXPERTS, K, config, tokens_and_choices


def spread(whole: MoE, rank: int, ranks: int) -> MoE:
    """A layer with the rank's part of the experts, and a dispatcher to the others."""
    part = MoE(whole.config)
    experts = whole.experts.num_experts
    share = experts // ranks
    for name, weight in whole.experts.named_parameters():
        setattr(part.experts, name, torch.nn.Parameter(weight.detach()[rank * share : (rank + 1) * share].clone()))
    part.dispatcher = Watched(dist.group.WORLD, experts)
    return part


def routed(moe: MoE, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> tuple[Tensor, bool]:
    """The routed experts' output, and whether the tokens were still on their way when `dispatch` returned."""
    sent = moe.dispatcher.dispatch(x_ND, experts_NK, gates_NK)
    travelling = still_on_their_way(sent)
    y_RD = moe.experts(*moe.dispatcher.receive(sent))
    return moe.dispatcher.combine(moe.dispatcher.send_back(y_RD, sent)), travelling


def check(case: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = MoE(config())
    for weight in whole.experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    part = spread(whole, rank, ranks)
    inputs = [tokens_and_choices(case, r) for r in range(ranks)]
    x_ND, experts_NK, gates_NK = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    expected_ND, _ = routed(whole, x_ND.requires_grad_(), experts_NK, gates_NK.requires_grad_())
    expected_ND.square().sum().backward()
    mine_ND, my_gates_NK = (inputs[rank][i].clone().requires_grad_() for i in (0, 2))
    actual_ND, travelling = routed(part, mine_ND, inputs[rank][1], my_gates_NK)
    assert travelling
    actual_ND.square().sum().backward()

    start = sum(len(inputs[r][0]) for r in range(rank))
    own = slice(start, start + len(mine_ND))
    torch.testing.assert_close(actual_ND, expected_ND[own])
    torch.testing.assert_close(mine_ND.grad, x_ND.grad[own])
    torch.testing.assert_close(my_gates_NK.grad, gates_NK.grad[own])
    share = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    for name, weight in part.experts.named_parameters():
        expected = whole.experts.get_parameter(name).grad[share]
        torch.testing.assert_close(torch.zeros_like(expected) if weight.grad is None else weight.grad, expected)
    assert experts_NK.shape[1] == K
    assert _get_work_registry_size() == 0, "a collective that nobody has waited for"


def check_node_limit(allowed: int) -> None:
    """Where a rank has one group's experts, a token arrives at as many ranks as groups are allowed, and no more."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    router = Router(config(n_routed_experts=32, num_experts_per_tok=8, n_group=ranks, topk_group=allowed))
    torch.nn.init.normal_(router.weight)
    router.expert_bias.normal_()
    whole = MoE(config(n_routed_experts=32))
    for weight in whole.experts.parameters():
        torch.nn.init.normal_(weight)
    part = spread(whole, rank, ranks)
    generator = torch.Generator().manual_seed(rank)
    reached = []
    for _ in range(40):  # of every rank a token at a time
        x_1D = torch.randn(1, 16, generator=generator)
        routed(part, x_1D, *router(x_1D)[:2])
        arrived = [torch.zeros(ranks, dtype=torch.int64) for _ in range(ranks)]
        dist.all_gather(arrived, torch.tensor(part.dispatcher.exchanged.received))
        reached += (torch.stack(arrived) > 0).sum(0).tolist()
    assert max(reached) == allowed, reached


COSTS = {  # per layer, of the forward and of the backward pass with what it computes again: all-to-alls, and waits
    "none": ((3, 1), (2, 0)),  # numbers of tokens, tokens, their way back; the gradients of the last two
    "selective": ((3, 1), (2, 1)),  # nothing is sent again
    "full": ((3, 1), (4, 1)),  # numbers and tokens again, but not the experts' outputs
}


def check_costs_of_a_layer() -> None:
    torch.manual_seed(0)
    whole = MoE(config(n_shared_experts=1))
    for weight in whole.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    check_costs(spread(whole, dist.get_rank(), dist.get_world_size()), COSTS)


class Watched(AllToAll):
    def exchange(self, *tokens: Any) -> Exchange:
        self.exchanged = super().exchange(*tokens)
        return self.exchanged


def still_on_their_way(sent: object) -> bool:
    """Whether nobody has waited for the tokens yet."""
    flight = sent.exchange.message if isinstance(sent, Sent) and sent.exchange else None
    return flight is not None and isinstance(flight.rows, AsyncCollectiveTensor) and not flight.rows.completed


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in ("uneven", "one expert", "no tokens on rank 0", "no tokens for rank 0", "padding"):
        check(case)
    if dist.get_world_size() == 2:
        check_costs_of_a_layer()
    if dist.get_world_size() == 4:
        for allowed in (1, 2, 4):
            check_node_limit(allowed)
    gc.collect()  # the group ends when nothing has it any more; its threads must not outlive the interpreter
    dist.destroy_process_group()
