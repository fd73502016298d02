"""One rank of a metric whose states are added up over all, held against torchmetrics' own way.

python -m tests.parallel.metrics_worker, under a launcher's environment.
"""

import gc

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.utilities.distributed import gather_all_tensors

from dsv3_lightning.model.router import Router
from dsv3_lightning.training.metrics import TokenLoss
from dsv3_lightning.training.router_metrics import ChoiceStatistics
from tests.parallel.small import config

STATES = ("margins_L", "margin_tokens_L", "groups_L", "tokens_L", "together_LEE", "counts_LOE")


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


def statistics() -> ChoiceStatistics:
    """Of other tokens, and other numbers of them, on each rank."""
    torch.manual_seed(0)
    router = Router(config(n_routed_experts=32, num_experts_per_tok=4))
    torch.nn.init.normal_(router.weight)
    metric = ChoiceStatistics(router.config, origins=2)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    tokens = 50 + 30 * dist.get_rank()
    x_ND, origins_N = torch.randn(tokens, 16, generator=generator), torch.arange(tokens) % 2
    metric.update(0, router(x_ND), router.expert_bias, origins_N < 2, origins_N)
    return metric


def check_states() -> None:
    metric = statistics()
    metric.margins_L[0] += 1e9 / 3  # fp32 would lose what the tokens added
    metric.together_LEE[0, 0, 0] += 2**53  # and fp64 this count
    before = {name: getattr(metric, name).clone() for name in STATES}
    metric.sync(gather_all_tensors)
    expected = {name: getattr(metric, name) for name in STATES}
    metric.unsync()
    with Largest() as largest:
        metric.sync()
    assert largest.bytes == metric.together_LEE.nbytes, (largest.bytes, metric.together_LEE.nbytes)
    assert all(torch.equal(getattr(metric, name), expected[name]) for name in STATES)
    assert not torch.equal(metric.tokens_L, before["tokens_L"])
    metric.unsync()
    assert all(torch.equal(getattr(metric, name), before[name]) for name in STATES)
    found = metric.compute()
    assert torch.equal(found[2], expected["together_LEE"]) and torch.equal(found[3], expected["counts_LOE"])
    metric.update(0, *no_tokens(metric))  # continues from the rank's own sums
    assert all(torch.equal(getattr(metric, name), before[name]) for name in STATES)


def no_tokens(metric: ChoiceStatistics) -> tuple:
    router = Router(metric.config)
    return router(torch.zeros(4, 16)), router.expert_bias, torch.zeros(4, dtype=torch.bool)


def check_calls() -> None:
    """One all-reduce for each state, within the group that is asked for; scalars of a rank without targets too."""
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda value, group=None: (calls.append(value.numel()), all_reduce(value, group=group))
    dist.all_gather = None
    rank = dist.get_rank()
    loss = TokenLoss(1)
    loss.update(torch.tensor([6.0 + rank]), torch.tensor([[[1, 2, 3 if rank else -100]]]))
    assert loss.compute() == [13 / 5] and calls == [1, 1]
    own = [dist.new_group([number]) for number in range(dist.get_world_size())]
    loss.sync(process_group=own[rank])
    assert int(loss.count_P) == 2 + rank
    loss.unsync()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with torch.no_grad():
        check_states()
        check_calls()
    gc.collect()  # the group ends when nothing has it any more; its threads must not outlive the interpreter
    dist.destroy_process_group()
