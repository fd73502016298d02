"""What is offloaded, and nothing else, is on the host. No test has a GPU: `meta` stands for one, with tensors that are
plainly elsewhere."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.parallel.strategy import MeshStrategy, move_all_but_parameters
from dsv3_lightning.parallel.tensors import as_dtensor_like, local
from dsv3_lightning.training.dry_run import fake_process_group
from dsv3_lightning.training.module import PretrainModule

GPU = torch.device("meta")


@pytest.fixture
def module():
    config = check(compose(["nano"]).tree)
    module = PretrainModule(config.model, config.optimizer, config.loss, config.compute, 64, max_steps=1, seed=1)
    module.model.to_empty(device="cpu")
    return module


def test_buffers_metrics_and_the_module_are_on_the_gpu_and_parameters_on_the_host(module):
    move_all_but_parameters(module, GPU)
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    buffers = dict(module.named_buffers())
    assert sum(name.endswith("expert_bias") for name in buffers) == 3
    assert {buffer.device.type for buffer in buffers.values()} == {"meta"}
    assert set(buffers) - set(module.state_dict()) == set()  # still buffers, and saved
    assert module.train_loss.nll_P.is_meta and module.val_bpb.nll.is_meta
    assert module.device == GPU  # where sums over ranks are made, and batches go


def test_the_strategy_moves_them_so_where_it_offloads(module, monkeypatch):
    monkeypatch.setattr(MeshStrategy, "root_device", GPU)
    for offload in (True, False):
        strategy = MeshStrategy(kind="fsdp2", cpu_offload=offload)
        strategy._lightning_module = strategy._model = module
        strategy.model_to_device()
        assert module.model.layers[1].mlp.gate.expert_bias.is_meta
        assert module.model.lm_head.weight.is_meta != offload
        # gloo is for parts on the host, which are gathered for a checkpoint
        assert strategy.process_group_backend == ("cpu:gloo,cuda:nccl" if offload else None)


def test_a_part_on_the_host_stays_there_when_it_is_joined_to_the_others():
    """Moments of AdamW, for a checkpoint: all of them at once would not fit the GPU."""
    with fake_process_group(2):
        mesh = init_device_mesh("cuda", (2,))
        nowhere = torch.empty(2, 4, device="meta")
        weight = DTensor.from_local(nowhere, mesh, [Shard(0)], run_check=False, shape=(4, 4), stride=(4, 1))
        moment = torch.arange(8.0).view(2, 4)
        joined = as_dtensor_like(weight, moment)
        assert isinstance(joined, DTensor) and joined.shape == (4, 4) and joined.placements == (Shard(0),)
        assert local(joined).data_ptr() == moment.data_ptr()
