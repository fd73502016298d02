"""How often a step communicates, counted on the first rank of a fake process group, with tensors that have no data."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import StrategyConfig, mesh_shape
from dsv3_lightning.parallel.sharding import shard_model, sync_gradients_of_replicas
from dsv3_lightning.training import dry_run

MODEL = ModelConfig(
    vocab_size=512, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=16, num_experts_per_tok=2,
    moe_intermediate_size=32, max_position_embeddings=64, num_nextn_predict_layers=2, first_k_dense_replace=1,
)  # fmt: skip
BLOCKS, MOE = 5, 4
UNITS = BLOCKS + MOE + 2 + 3  # blocks, experts, two eh_proj; the embedding, the head, the norms and routers


class Sent(dry_run.Counter):
    """Counts FSDP's collectives by name, and the numbers that they gather."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.gathered = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and DTensor not in types:
            self.calls[func._opname] += 1
            if func._opname == "_allgather_base_":
                self.gathered += args[0].numel()
        return super().__torch_dispatch__(func, types, args, kwargs)


def sent(ranks: int, per_node: int, micro_batches: int, checkpointing: str = "none", **strategy) -> list[Sent]:
    """What each micro-batch of a step sends, after a step that set everything up."""
    config = StrategyConfig(**strategy)
    with dry_run.fake_process_group(ranks):
        with torch.device("meta"):
            model = Transformer(MODEL, checkpointing)
        shape = mesh_shape(config, ranks, per_node, MODEL)
        shard_model(model, build_meshes(shape, "cpu"), config, "bf16-mixed", dry_run.EvenLoads)
        counts = []
        with FakeTensorMode(allow_non_fake_inputs=True):
            dry_run.compute_as_on_a_gpu(model)
            model.to_empty(device="cpu")
            tokens, targets = torch.zeros(2, 35, dtype=torch.int64), torch.zeros(2, 3, 32, dtype=torch.int64)
            for part in [0, *range(1, micro_batches + 1)]:
                sync_gradients_of_replicas(model, part in (0, micro_batches))
                with Sent() as counted, torch.autocast("cpu", torch.bfloat16):
                    model.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), targets).nll_P.sum().backward()
                counts.append(counted)
        return counts[1:]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_micro_batch_gathers_a_block_twice_and_all_else_once(checkpointing):
    """Blocks and eh_proj are gathered again for the backward pass, but neither the embedding nor the head nor the small
    parameters, though three heads use them."""
    (counted,) = sent(16, 16, 1, checkpointing, kind="fsdp2")
    assert counted.calls["_allgather_base_"] == 2 * (BLOCKS + MOE + 2) + 3
    assert counted.calls["_reduce_scatter_base_"] == UNITS
    assert counted.calls["allreduce_"] == 0


def test_replicas_are_reduced_once_per_step():
    *first, last = sent(16, 4, 3, kind="hsdp")
    assert [counted.calls["allreduce_"] for counted in (*first, last)] == [0, 0, UNITS]
    assert {counted.calls["_reduce_scatter_base_"] for counted in (*first, last)} == {UNITS}


def test_norms_and_routers_are_gathered_within_a_node_without_padding():
    """On 64 ranks a router of 16 rows would be padded to 64, and each norm and expert layer with it."""
    (within,), (across,) = (sent(64, per_node, 1, kind="fsdp2") for per_node in (8, 64))
    routers, latent_norms = MOE * 16 * 64, BLOCKS * 16  # the other norms are 64 wide
    assert across.gathered - within.gathered == (64 // 16 - 1) * (routers + latent_norms)
