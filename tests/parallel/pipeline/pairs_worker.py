"""One of two ranks with half of the experts each: a forward and a backward pass of two stages, in turns.

python -m tests.parallel.pipeline.pairs_worker, under a launcher's environment. Held against the passes one after the
other; and the order of attention, experts, messages and waiting.
"""

import gc
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _get_work_registry_size
from torch.distributed.fsdp import FSDPModule

from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import StrategyConfig, mesh_shape
from dsv3_lightning.parallel.pipeline.pairs import in_turns
from dsv3_lightning.parallel.pipeline.stage import Chunk, Record, Stage, Weights, keep_chunks
from dsv3_lightning.parallel.sharding import shard_model
from dsv3_lightning.parallel.tensors import fill_shard, gather_full
from tests.model.small import small_batch, small_config
from tests.parallel.overlap_worker import Events
from tests.parallel.weight_grad_worker import reduce_gradients, set_syncing

CONFIG = small_config(num_hidden_layers=5, first_k_dense_replace=1, num_nextn_predict_layers=1)


def make(policy: str, precision: str) -> list[Stage]:
    """A dense layer and two MoE layers; and two MoE layers with an MTP module."""
    strategy = StrategyConfig(kind="fsdp2_ep", reshard_after_forward=False)
    with torch.device("meta"):
        model = Transformer(CONFIG, policy)
    chunks = [Chunk(0, 2, range(0, 3)), Chunk(1, 2, range(3, 5))]
    keep_chunks(model, chunks)
    meshes = build_meshes(mesh_shape(strategy, dist.get_world_size(), 2, CONFIG), "cpu")
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    stages = [Stage(model, chunk, autocast) for chunk in chunks]
    for stage in stages:
        shard_model(stage, meshes, replace(strategy, pipeline_parallel=2), precision)
        stage.record = Record(
            weights=Weights(Tensor.sum, lambda balance, _rows: sum(t.sum() for t in balance.values()))
        )
    model.to_empty(device="cpu")
    model.init_weights(0, fill_shard)
    return stages


def inputs(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    batch = small_batch(CONFIG, seed=10 * seed + dist.get_rank(), padding=(0, seed))
    return batch.tokens, {"mask": batch.mask, "targets": batch.targets}


def leaves(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [output.detach().requires_grad_() for output in outputs]


def step(policy: str, precision: str, paired: bool) -> tuple[dict[str, Tensor], list[str], list[Tensor]]:
    """Micro-batches 0 and 1 through both stages: the first stage's forward pass of 1 is paired with the last stage's
    backward pass of 0, and the last stage's forward pass of 1 with the first stage's backward pass of 0."""
    first, last = make(policy, precision)
    for stage in (first, last):  # as the pipeline's runtime does
        set_syncing(stage, False)
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
    tokens, arguments = inputs(0)
    sent = first(tokens, **arguments)
    received = leaves(sent)
    loss = last(*received, **arguments)
    tokens, others = inputs(1)
    with Events() as events:
        if paired:
            other_sent = in_turns(first, loss.backward, tokens, **others)
        else:
            other_sent = first(tokens, **others)
            loss.backward()
    other_received = leaves(other_sent)
    gradients = [leaf.grad for leaf in received]
    back = partial(torch.autograd.backward, sent, gradients)
    if paired:
        other_loss = in_turns(last, back, *other_received, **others)
    else:
        other_loss = last(*other_received, **others)
        back()
    other_loss.backward()
    torch.autograd.backward(other_sent, [leaf.grad for leaf in other_received])
    assert _get_work_registry_size() == 0, "a collective that nobody has waited for"
    for stage in (first, last):
        reduce_gradients(stage)
    found = {f"{stage.chunk.number}.{name}": gather_full(parameter.grad)
             for stage in (first, last) for name, parameter in stage.named_parameters()}  # fmt: skip
    counts = [stage.record.counts_LE for stage in (first, last)]
    return found, events.log, [loss.detach(), other_loss.detach(), last.record.nll_P, *counts]


PAIRED = [  # forward: a dense layer and two MoE layers; backward: the MTP module and two MoE layers
    "attention", "send 0",  # forward, up to the tokens of the first MoE layer
    "send 1",  # backward: gradients of the MTP module's outputs
    "wait 0", "experts", "send 2",  # forward: experts, during the way of these gradients
    "wait 1", "experts", "send 3",  # backward: experts, during the way of the forward pass's outputs
    "wait 2", "attention", "send 4",  # forward: the second MoE layer, up to its tokens
    "wait 3", "attention", "send 5",  # backward: attention, and the next layer's outputs
    "wait 4", "experts", "send 6",  # forward
    "wait 5", "experts", "send 7",  # backward
    "wait 6",  # forward: its end
    "wait 7", "attention", "send 8", "wait 8", "experts", "send 9", "wait 9", "attention",  # backward, alone
]  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for policy, precision in (("none", "32-true"), ("selective", "bf16-mixed"), ("full", "32-true")):
        (plain, order, sums), (paired, turns, paired_sums) = (step(policy, precision, way) for way in (False, True))
        for expected, actual in zip(sums, paired_sums, strict=True):
            torch.testing.assert_close(actual, expected)
        for name, gradient in plain.items():
            error = (paired[name] - gradient).norm() / gradient.norm()
            assert error < 1e-6, (policy, name, float(error))
        assert turns != order
        if policy != "full":
            assert turns == PAIRED, turns
    gc.collect()  # the group ends when nothing has it any more; its threads must not outlive the interpreter
    dist.destroy_process_group()
