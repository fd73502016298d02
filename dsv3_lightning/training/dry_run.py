"""Dry run of a training step: the memory of one rank of any mesh, counted on a laptop without computing.

The run's own code builds, shards and steps the model, in a fake process group and with fake tensors, which have shapes
but no data. Expert loads depend on data, so they are assumed to be even. torch has no public names for fake tensors,
fake process groups and dispatch modes, so that this file imports private ones.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # noqa: F401  collectives of fake tensors
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_lightning.model import cpu
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.dispatch import AllToAll, Splits
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.parallel.sharding import shard_model
from dsv3_lightning.parallel.tensors import local
from dsv3_lightning.training.config import OptimizerConfig
from dsv3_lightning.training.optimizer import build_optimizer
from dsv3_lightning.training.precision import precision_plugin


@dataclass(frozen=True)
class MemoryCount:
    """Bytes on a rank: its persistent state, and the peak of a step. parameters: of the whole model."""

    weights: int
    gradients: int
    optimizer: int
    peak: int
    parameters: int


def dry_run(
    model: ModelConfig, optimizer: OptimizerConfig, strategy: StrategyConfig, shape: MeshShape, samples: int,
    sequence_length: int, precision: str, checkpointing: str,
) -> MemoryCount:  # fmt: skip
    """Counts two steps of one micro-batch of `samples` samples on the first of `shape.ranks` ranks."""
    plugin = precision_plugin(precision, torch.device("cpu"))
    with fake_process_group(shape.ranks):
        with torch.device("meta"):
            module = Transformer(model, checkpointing)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        shard_model(module, build_meshes(shape, "cpu"), strategy, str(plugin.precision), EvenLoads)
        compute_as_on_a_gpu(module)
        with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
            module.to_empty(device="cpu")
            module.tie_weights()
            weights = counter.now
            built = build_optimizer(module, optimizer, str(plugin.precision))
            counter.peak = 0  # making a DTensor creates a fake tensor of the full shape
            for _ in range(2):  # the first makes the moments; its gradients stay, as between micro-batches
                step(module, built, plugin, samples, sequence_length)
            gradients = sum(local(p.grad).nbytes for p in module.parameters() if p.grad is not None)
            return MemoryCount(weights, gradients, counter.now - weights - gradients, counter.peak, parameters)


def step(module: Transformer, optimizer: torch.optim.Optimizer, plugin: Precision, samples: int, length: int) -> None:
    depth = module.config.mtp_depth
    tokens = torch.zeros(samples, length + 1 + depth, dtype=torch.int64)
    targets = torch.zeros(samples, 1 + depth, length, dtype=torch.int64)
    with plugin.forward_context():
        result = module.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), targets)
    (result.nll_P.sum() + sum(term.sum() for term in result.balance.values())).backward()
    optimizer.step()


@contextmanager
def fake_process_group(ranks: int, rank: int = 0) -> Iterator[None]:
    """Makes this process one of `ranks`; collectives send nothing."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def compute_as_on_a_gpu(model: Transformer) -> None:
    """Gives the loss a GPU's chunks. Other code for CPUs leaves fake tensors alone: see `cpu.on_cpu`."""
    if hasattr(model, "lm_head"):  # not in every stage of a pipeline
        model.lm_head.chunks = cpu.loss_chunks("cuda", model.config.vocab_size)


class EvenLoads(AllToAll):
    """A dispatcher that assumes equally many routed tokens for every rank's experts."""

    def exchange_counts(self, counts_E: Tensor, copies: int) -> tuple[Tensor, Splits]:
        ranks = self.group.size()
        return counts_E.view(ranks, -1), Even([copies // ranks + (rank < copies % ranks) for rank in range(ranks)])


class Even:
    """The same numbers of routed tokens to and from each rank."""

    arrived: torch.cuda.Event | None = None

    def __init__(self, each: list[int]) -> None:
        self.each = each

    def numbers(self) -> list[int]:
        return [*self.each, *self.each]


class Counter(TorchDispatchMode):
    """Counts memory. now: bytes of all tensors that were made under it and still live. peak: the maximum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.fake = active_fake_mode()
        self.known: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()

    def __enter__(self) -> "Counter":
        """Also wraps UntypedStorage.resize_, which FSDP calls and no mode sees, as torch's own MemTracker does."""
        self.resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = self.resize(storage, size)
            if storage in self.known:
                self.add(size - self.known[storage][0])
                self.known[storage][0] = size
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # its local tensors are counted themselves
            return NotImplemented
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return args[0].new_empty(grouped_shape(*args))
        if func is torch.ops._c10d_functional.wait_tensor.default:  # allocates nothing
            return args[0]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and active_fake_mode() is self.fake:  # DTensor has another mode for shapes
                self.meet(tensor)
        return result

    def meet(self, tensor: Tensor) -> None:
        if tensor.is_meta or isinstance(tensor, nn.Parameter):
            return
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = [storage.nbytes()]
            self.known[storage] = size
            weakref.finalize(storage, self.forget, size)
            self.add(size[0])

    def forget(self, size: list[int]) -> None:
        self.now -= size[0]

    def add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def grouped_shape(a: Tensor, b: Tensor, offsets_E: Tensor, *more: Any) -> tuple[int, ...]:
    """The output shape of a grouped product, which torch's fake tensors support for bf16 only."""
    return (len(a), b.shape[-1]) if b.dim() == 3 else (len(offsets_E), len(a), b.shape[-1])
