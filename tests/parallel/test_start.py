"""A model of any size starts in parts: no rank holds the whole of it, whether weights are drawn or read."""

import pytest
import torch

from dsv3_lightning.hub.folder import HubFolder
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import StrategyConfig, mesh_shape
from dsv3_lightning.parallel.sharding import shard_model
from dsv3_lightning.parallel.tensors import fill_shard, local
from dsv3_lightning.training.dry_run import Counter, fake_process_group
from tests.hub.folders import exported
from tests.model.small import small_model
from tests.parallel.small import config

RANKS = 8
MODEL = config(
    vocab_size=256, hidden_size=64, num_hidden_layers=6, intermediate_size=128, moe_intermediate_size=64,
    kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)  # fmt: skip


@pytest.mark.parametrize("source", ["drawn", "read"])
@pytest.mark.parametrize("experts_over", [1, 2, 8])
def test_no_rank_ever_holds_more_than_its_part_and_a_matrix(experts_over, source, tmp_path):
    """The most at a time is counted: a rank's eighth, and what one matrix needs on its way into it."""
    folder = exported(small_model(MODEL), tmp_path / "out") if source == "read" else None
    strategy = StrategyConfig(kind="fsdp2_ep", expert_parallel=experts_over)
    with fake_process_group(RANKS):
        with torch.device("meta"):
            model = Transformer(MODEL)
        matrices = [(p if p.dim() == 2 else p[0]).numel() * 4 for p in model.parameters() if p.dim() > 1]
        whole = sum(p.numel() * 4 for p in model.parameters())
        shard_model(model, build_meshes(mesh_shape(strategy, RANKS, RANKS, MODEL), "cpu"), strategy, "32-true")
        with Counter() as counter:
            model.to_empty(device="cpu")
            model.init_weights(1, fill_shard)
            if folder is not None:
                HubFolder(folder).load_into(model, fill_shard)
        own = sum(local(p).numel() * 4 for p in model.parameters())
    assert own < 1.02 * whole / RANKS
    assert own < counter.peak < own + 4 * max(matrices) < 0.4 * whole, (own, counter.peak, max(matrices), whole)
