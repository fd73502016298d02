"""What a block holds after its passes, counted on fake tensors, is what the plan says."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.fp8 import Rounded, emulated_product, use_fp8
from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.rope import cos_sin
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.model.weight_grad import WeightQueue
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import MeshShape
from dsv3_lightning.parallel.sharding import spread_experts
from dsv3_lightning.planning.activations import widths_of
from dsv3_lightning.planning.share import Share
from dsv3_lightning.training.dry_run import Counter, EvenLoads, fake_process_group
from dsv3_lightning.training.precision import precision_plugin

T = 256
# Wider than nano, so that the small things that no plan counts are small.
WORDS = ("model.hidden_size=256", "model.intermediate_size=384", "model.moe_intermediate_size=128",
         "model.kv_lora_rank=128", "model.q_lora_rank=64", "trainer.precision=32",
         f"data.sequence_length={T}")  # fmt: skip
NANO = check(compose(["nano"], WORDS).tree).model
GQA = check(compose(["nano"], [*WORDS, "model.attention=gqa", "model.num_key_value_heads=2", "model.kv_lora_rank=0",
                               "model.q_lora_rank=null"]).tree).model  # fmt: skip
DENSE, MOE = Share(1, 0, 0, 0, 0), Share(0, 1, 0, 0, 0)


def in_bf16(a: Rounded, b: Rounded, offsets_E: Tensor | None) -> Tensor:
    """A product with the types and sizes of torch's scaled one, which fake tensors of a CPU don't have."""
    return a.numbers.bfloat16() @ b.numbers.bfloat16()


def counted(
    model: ModelConfig, share: Share, precision: str, policy: str, ep: int = 1, fp8: bool | str = False
) -> tuple[float, float]:
    """Bytes per token that a block holds after its forward pass, with its input where recomputation or a norm keeps it;
    and after the input part of its backward pass."""
    plugin = precision_plugin(precision, torch.device("cpu"))
    with fake_process_group(ep):
        meshes = build_meshes(MeshShape(1, ep, ep), "cpu")
        with torch.device("meta"):
            whole = Transformer(model, policy)
        for moe in (each for each in whole.modules() if isinstance(each, MoE) and ep > 1):
            spread_experts(moe, meshes, EvenLoads)
        if precision != "32":
            whole.bfloat16()  # as sharded weights are gathered
        with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
            whole.to_empty(device="cpu")
            if fp8:
                use_fp8(whole, emulated_product if fp8 == "emulated" else in_bf16, experts=fp8 == "emulated")
            block, queue = whole.layers[share.moe], WeightQueue()
            residual = torch.bfloat16 if precision == "bf16" else torch.float32
            x = torch.zeros(1, T, model.hidden_size, dtype=residual, requires_grad=True)
            mask, rope = torch.ones(1, T, dtype=torch.bool), cos_sin(model, torch.arange(T))
            start = counter.now
            with plugin.forward_context():
                out, _ = whole.recompute(block, x, rope, mask, None)
            held = counter.now - start - out.nbytes
            if policy != "none" or residual == torch.float32:
                held += x.nbytes
            with queue.collect():
                torch.autograd.backward(out, torch.zeros_like(out))
            at_once = sum(p.grad.nbytes for p in (x, *block.parameters()) if p.grad is not None)
            return held / T, (counter.now - start - out.nbytes - at_once) / T


def check_block(model: ModelConfig, share: Share, precision: str, policy: str, ep: int, fp8: bool | str = False):
    widths = widths_of(model, precision, ep, fp8)
    held, between = counted(model, share, precision, policy, ep, fp8)
    weights = widths.rounded_weights(share) / T if policy == "none" else 0
    assert widths.kept(share, policy) + weights == pytest.approx(held, rel=0.01)
    assert widths.between_parts(share) == pytest.approx(between, rel=0.05 if fp8 == "emulated" else 0.015)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize(("share", "ep"), [(DENSE, 1), (MOE, 1), (MOE, 2)], ids=["dense", "local", "dispatched"])
def test_a_block_keeps_what_is_planned(share: Share, ep: int, policy: str):
    for precision in ("32", "bf16-mixed") if share == DENSE else ("bf16",):
        check_block(NANO, share, precision, policy, ep)


@pytest.mark.parametrize("policy", ["none", "selective"])
def test_a_block_with_grouped_queries_keeps_what_is_planned(policy: str):
    check_block(GQA, DENSE, "bf16", policy, 1)


@pytest.mark.parametrize("policy", ["none", "selective"])
@pytest.mark.parametrize("fp8", [True, "emulated"])
def test_a_block_in_fp8_keeps_tiles_and_for_each_micro_batch_its_weights(fp8: bool | str, policy: str):
    """The emulation also of experts; the scales of its partial tiles aren't planned."""
    check_block(NANO, MOE, "bf16", policy, 2, fp8)
