"""One rank of a model whose MoE layers take a batch in two halves, held against the same model without halves.

python -m tests.parallel.overlap_worker, under a launcher's environment. On four ranks as two nodes of two, and with
experts that are sharded over two ranks. On two also the order of computation, of messages and of waiting for them.
"""

import gc

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _get_work_registry_size
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_lightning.model.transformer import Losses, Transformer
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import StrategyConfig, mesh_shape
from dsv3_lightning.parallel.sharding import shard_model
from dsv3_lightning.parallel.tensors import fill_shard, gather_full
from tests.model.small import small_batch, small_config

SEQUENCES, DEPTH = 3, 1


def step(overlap: str, policy: str, **settings) -> tuple[Losses, dict[str, Tensor]]:
    model = make(small_config(num_nextn_predict_layers=DEPTH), overlap, policy, **settings)
    losses = forward(model)
    total(losses).backward()
    assert _get_work_registry_size() == 0, "a collective that nobody has waited for"
    return losses, {name: gather_full(parameter.grad) for name, parameter in model.named_parameters()}


def make(config, overlap: str, policy: str, per_node: int = 2, **settings) -> Transformer:
    strategy = StrategyConfig(kind="fsdp2_ep", overlap=overlap, **settings)
    with torch.device("meta"):
        model = Transformer(config, policy, ("sequence", "batch"))
    shape = mesh_shape(strategy, dist.get_world_size(), per_node, config)
    shard_model(model, build_meshes(shape, "cpu"), strategy, "32-true")
    model.to_empty(device="cpu")
    model.init_weights(0, fill_shard)
    return model


def forward(model: Transformer) -> Losses:
    rank = dist.get_rank()  # another number of padding on every rank
    return model.losses(*small_batch(model.config, B=SEQUENCES, seed=rank, padding=(0, rank, 3)))


def total(losses: Losses) -> Tensor:
    return losses.nll_P.sum() + losses.balance["sequence"].sum() + (losses.balance["batch"] ** 2).sum()


def check(policy: str, **settings) -> None:
    plain, halved = (step(overlap, policy, **settings) for overlap in ("none", "two_batches"))
    torch.testing.assert_close(halved[0].nll_P, plain[0].nll_P)
    assert torch.equal(halved[0].counts_LE, plain[0].counts_LE)
    for name, gradient in plain[1].items():
        error = (halved[1][name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, (policy, settings, name, float(error))


class Events(TorchDispatchMode):
    """What runs inside, in its order: attention, experts, messages with rows, by number, and waiting for these."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.sent = 0
        self.under_way: dict[int, int] = {}  # by the address of what arrives

    def note(self, event: str) -> None:
        if self.log[-1:] != [event]:
            self.log.append(event)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "all_to_all_single" and out.dtype.is_floating_point:
            self.note(f"send {self.sent}")
            self.under_way[out.data_ptr()] = self.sent
            self.sent += 1
        elif name == "wait_tensor" and args[0].data_ptr() in self.under_way:
            self.note(f"wait {self.under_way.pop(args[0].data_ptr())}")
        elif "dot_product" in name or name in ("baddbmm", "bmm"):  # of long sequences, of short ones
            self.note("attention")
        elif name == "_grouped_mm":
            self.note("experts")
        return out


ORDER = {
    "forward": [
        "attention", "send 0", "attention", "send 1",  # tokens of half 0 travel during the attention of half 1
        "wait 0", "experts", "send 2",  # tokens of half 1 travel during the experts of half 0
        "wait 1", "experts", "send 3",  # outputs of half 0 travel during the experts of half 1
        "wait 2", "wait 3",
    ],
    "backward": [
        "send 0", "send 1", "wait 0", "experts", "send 2",  # of outputs: half 0's during the experts of half 1
        "wait 1", "experts", "send 3",  # of tokens: half 1's during the experts of half 0,
        "wait 2", "attention", "wait 3", "attention",  # and half 0's during the attention of half 1
    ],
}  # fmt: skip


def check_order() -> None:
    config = small_config(num_hidden_layers=1, first_k_dense_replace=0)
    for policy in ("none", "selective"):
        model = make(config, "two_batches", policy)
        with Events() as ahead:
            loss = total(forward(model))
        with Events() as back:
            loss.backward()
        assert ahead.log == ORDER["forward"], ahead.log
        assert back.log == ORDER["backward"], (policy, back.log)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_world_size() == 2:
        check_order()
        for policy in ("none", "selective", "full"):
            check(policy)
    else:
        check("full", expert_parallel=4)
        check("none", expert_parallel=4)
        check("selective", expert_parallel=2)
        check("none", expert_parallel=2, reshard_after_forward=False)
    gc.collect()  # the group ends when nothing has it any more; its threads must not outlive the interpreter
    dist.destroy_process_group()
