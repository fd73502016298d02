"""One rank of a sharded model whose weight gradients are computed late, as a pipeline's stages do.

python -m tests.parallel.weight_grad_worker, under a launcher's environment. Weights are gathered once per step, and
gradients reduced once, after all of them (`reduce_gradients`, as `PipelineStage.perform_reduce_grad` of torch).
"""

import gc

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.model.weight_grad import WeightQueue
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import StrategyConfig, mesh_shape
from dsv3_lightning.parallel.sharding import as_unit, shard_model
from dsv3_lightning.parallel.tensors import fill_shard, gather_full
from tests.model.small import Batch, small_batch, small_config, total_loss

CONFIG = small_config(num_nextn_predict_layers=1)
MICRO_BATCHES = 6


def make(kind: str, precision: str, policy: str) -> Transformer:
    ranks = dist.get_world_size()
    strategy = StrategyConfig(kind=kind, reshard_after_forward=False)
    with torch.device("meta"):
        model = Transformer(CONFIG, policy)
    shard_model(model, build_meshes(mesh_shape(strategy, ranks, ranks, CONFIG), "cpu"), strategy, precision)
    model.to_empty(device="cpu")
    model.init_weights(0, fill_shard)
    return model


def reduce_gradients(model: Transformer) -> None:
    set_syncing(model, True)
    state = fully_shard.state(model)
    for unit in state._state_ctx.all_states:
        for group in unit._fsdp_param_groups:
            group.post_backward()
    state._root_post_backward_final_callback()


def set_syncing(model: Transformer, wanted: bool) -> None:
    as_unit(model).set_is_last_backward(wanted)
    as_unit(model).set_reshard_after_backward(wanted)
    as_unit(model).set_requires_gradient_sync(wanted)


def loss_of(model: Transformer, batch: Batch, precision: str) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        return total_loss(model.losses(*batch), batch.targets) / MICRO_BATCHES


def gradients(model: Transformer, precision: str, late: bool) -> dict[str, Tensor]:
    """Of a step: two forward passes ahead, weight gradients when all others are there."""
    rank = dist.get_rank()
    batches = [small_batch(CONFIG, seed=10 * rank + i) for i in range(MICRO_BATCHES)]
    model.zero_grad()
    set_syncing(model, False)
    queues: list[WeightQueue] = []
    losses: list[Tensor] = []

    def backward() -> None:
        queues.append(WeightQueue())
        if late:
            with queues[-1].collect():
                losses.pop(0).backward()
        else:
            losses.pop(0).backward()

    for i, batch in enumerate(batches):
        losses.append(loss_of(model, batch, precision))
        if i >= 2:
            backward()
        if i == 4:  # one of them early
            queues[0].run()
    backward()
    backward()
    assert any(queue.waiting for queue in queues) == late
    for queue in queues:
        queue.run()
    reduce_gradients(model)
    return {name: gather_full(parameter.grad) for name, parameter in model.named_parameters()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind, precision, policy in (
        ("fsdp2", "32-true", "none"),
        ("fsdp2", "bf16-mixed", "selective"),
        ("fsdp2_ep", "32-true", "full"),
        ("fsdp2_ep", "bf16-mixed", "none"),
        ("fsdp2_ep", "bf16-true", "selective"),
    ):
        model = make(kind, precision, policy)
        at_once, late = (gradients(model, precision, wanted) for wanted in (False, True))
        for name, expected in at_once.items():
            error = (late[name] - expected).norm() / expected.norm()
            assert late[name].dtype == torch.float32 and error < 1e-6, (kind, precision, policy, name, float(error))
        del model
    gc.collect()  # the group ends when nothing has it any more; its threads must not outlive the interpreter
    dist.destroy_process_group()
