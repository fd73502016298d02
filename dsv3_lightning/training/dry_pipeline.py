"""Dry run of one rank of a pipeline: the memory of a step's passes, in the order of the schedule, without computing.

The run's own stages are sharded and make their passes, on fake tensors. There are no messages: what arrives from other
stages is made when its pass starts, as the run's own receive buffers are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.model.weight_grad import WeightQueue
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.parallel.pipeline.checks import placement_of
from dsv3_lightning.parallel.pipeline.pipeline import Pipeline
from dsv3_lightning.parallel.pipeline.stage import Record, Stage, Weights
from dsv3_lightning.parallel.pipeline.torch_stage import Shape, TorchStage, tensors_between
from dsv3_lightning.parallel.sharding import shard_model
from dsv3_lightning.parallel.tensors import local
from dsv3_lightning.planning.pipeline.actions import Action, schedule_slots
from dsv3_lightning.training.config import OptimizerConfig
from dsv3_lightning.training.dry_run import Counter, EvenLoads, MemoryCount, compute_as_on_a_gpu, fake_process_group
from dsv3_lightning.training.optimizer import build_optimizer
from dsv3_lightning.training.precision import precision_plugin


def dry_pipeline(
    model: ModelConfig, optimizer: OptimizerConfig, strategy: StrategyConfig, shape: MeshShape, layers: Sequence[int],
    rank: int, samples: int, sequence_length: int, precision: str, checkpointing: str,
) -> MemoryCount:  # fmt: skip
    """Counts a step of `samples` samples per micro-batch on the first data-parallel rank of a stage.

    layers: of each chunk. rank: of the pipeline. A step has twice as many micro-batches as the pipeline has ranks. They
    fill it; more don't change what is live at the same time.
    """
    plugin = precision_plugin(precision, torch.device("cpu"))
    dtype = torch.bfloat16 if str(plugin.precision) == "bf16-true" else torch.float32
    placement = placement_of(strategy)
    micro_batches = 2 * shape.pp
    chunks, waiting = len(layers) // shape.pp, strategy.waiting_weights
    slots = schedule_slots(strategy.schedule, shape.pp, micro_batches, chunks, waiting)[rank]
    with fake_process_group(shape.ranks, rank * shape.data_ranks):
        with torch.device("meta"):
            module = Transformer(model, checkpointing)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        meshes = build_meshes(shape, "cpu")
        assert meshes.pp is not None
        pipeline = Pipeline(module, layers, placement, strategy.schedule, meshes.pp, torch.device("cpu"), dtype,
                            plugin.forward_context)  # fmt: skip
        for stage in pipeline.stages:
            shard_model(stage, meshes, strategy, str(plugin.precision), EvenLoads)
        compute_as_on_a_gpu(module)
        with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
            module.to_empty(device="cpu")
            weights = counter.now
            built = build_optimizer(module, optimizer, str(plugin.precision))
            passes = Passes(pipeline, Shape(micro_batches, samples, sequence_length))
            for _ in range(2):  # the first makes the moments, and DTensor's rules, which make tensors of full shapes
                counter.peak = 0
                built.zero_grad()
                passes.step([action for slot in slots for action in slot])
                built.step()
            gradients = sum(local(p.grad).nbytes for p in module.parameters() if p.grad is not None)
            return MemoryCount(weights, gradients, counter.now - weights - gradients, counter.peak, parameters)


class Passes:
    """The passes of a rank's stages, and what they hold between them."""

    def __init__(self, pipeline: Pipeline, shape: Shape) -> None:
        self.stages = {stage.chunk.number: stage for stage in pipeline.stages}
        self.shape, self.dtype, config = shape, pipeline.dtype, pipeline.model.config
        self.reducers = {
            chunk: TorchStage(stage, shape, pipeline.group, pipeline.device, pipeline.dtype)
            for chunk, stage in self.stages.items()
        }
        B, T, depth = shape.samples, shape.positions, config.mtp_depth
        self.tokens = torch.zeros(B, T + 1 + depth, dtype=torch.int64)
        self.mask = torch.ones(B, T + 1 + depth, dtype=torch.bool)
        self.targets = torch.zeros(B, 1 + depth, T, dtype=torch.int64)
        self.live: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # outputs by chunk and micro-batch
        self.queues: dict[tuple[int, int], WeightQueue] = {}

    def step(self, actions: Sequence[Action]) -> None:
        for stage in self.stages.values():
            stage.record = Record(Weights(lambda nll_P: nll_P.sum(), add_up))
            for unit in fsdp_units(stage):
                unit.unshard()
        for action in actions:
            {"F": self.forward, "B": self.backward, "I": self.inputs, "W": self.weights}[action.kind](action)
        for reducer in self.reducers.values():
            reducer.perform_reduce_grad(1)

    def forward(self, action: Action) -> None:
        stage = self.stages[action.chunk]
        received, _ = tensors_between(stage, self.shape, self.dtype)
        inputs = (self.tokens,) if stage.chunk.is_first else tuple(map(arrived, received))
        found = stage(*inputs, mask=self.mask, targets=self.targets)
        self.live[action.chunk, action.micro_batch] = found if isinstance(found, tuple) else (found,)

    def backward(self, action: Action) -> None:
        stage, outputs = self.stages[action.chunk], self.live.pop((action.chunk, action.micro_batch))
        stage_as_unit = fsdp_units(stage)[0]
        stage_as_unit.set_is_last_backward(False)
        stage_as_unit.set_reshard_after_backward(False)
        stage_as_unit.set_requires_gradient_sync(False)
        torch.autograd.backward(outputs, [torch.zeros_like(each) for each in outputs])

    def inputs(self, action: Action) -> None:
        queue = self.queues[action.chunk, action.micro_batch] = WeightQueue()
        with queue.collect():
            self.backward(action)

    def weights(self, action: Action) -> None:
        self.queues.pop((action.chunk, action.micro_batch)).run()


def add_up(terms: dict[str, Tensor], rows: Sequence[int]) -> Tensor | float:
    return sum((term.sum() for term in terms.values()), 0.0)


def arrived(example: Tensor) -> Tensor:
    """A tensor from another stage, of an example's shape."""
    return torch.zeros(example.shape, dtype=example.dtype, requires_grad=example.requires_grad)


def fsdp_units(stage: Stage) -> list[FSDPModule]:
    """The stage itself first."""
    return [module for module in stage.modules() if isinstance(module, FSDPModule)]
