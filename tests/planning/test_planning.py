"""Counts against the published models' (transformers on the meta device, the papers, other projects' counters)."""

import re
from collections import Counter

import pytest
import torch

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.planning.activations import activations
from dsv3_lightning.planning.flops import forward_flop_per_token, training_flop_per_token
from dsv3_lightning.planning.matrices import muon_matrices, muon_parameters, newton_schulz_flop
from dsv3_lightning.planning.memory import checkpoint_bytes, training_memory
from dsv3_lightning.planning.parameters import count_parameters
from dsv3_lightning.planning.share import whole_share

V2 = ModelConfig(
    vocab_size=102400, hidden_size=5120, num_hidden_layers=60, num_attention_heads=128,
    intermediate_size=12288, first_k_dense_replace=1, n_routed_experts=160, num_experts_per_tok=6,
    n_shared_experts=2, moe_intermediate_size=1536, n_group=8, topk_group=3, scoring_func="softmax",
    topk_method="group_limited_greedy", norm_topk_prob=False, routed_scaling_factor=16.0, q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=4096,
)  # fmt: skip


def preset(name: str) -> ModelConfig:
    return check(compose([name]).tree).model


@pytest.mark.parametrize(
    ("model", "total", "active", "flop", "at"),
    [
        ("v3", 671_026_404_352, 37_552_297_472 - 14_848, 250.45e9, 4096),  # published active counts hold the bias
        (V2, 235_741_434_880, 21_375_800_320, 155.30e9, 4096),
        ("v2-lite", 15_706_484_224, 2_661_150_208, 16.41e9, 4096),
        ("moonlight", 15_960_108_544, 2_914_776_192 - 1_664, 17.17e9, 4096),
        ("moonlight", 15_960_108_544, 2_914_776_192 - 1_664, 18.87e9, 8192),
        ("llm-7b", 6_910_365_696, 6_910_365_696, 41.96e9, 4096),  # transformers' Llama of these shapes
        ("llm-67b", 67_425_001_472, 67_425_001_472, 418.63e9, 4096),
    ],
)
def test_main_models_have_the_published_numbers(model, total: int, active: int, flop: float, at: int):
    model = preset(model) if isinstance(model, str) else model
    parameters = count_parameters(model)
    assert (parameters.main_model.total, parameters.active) == (total, active)
    assert 3 * forward_flop_per_token(model, at, with_mtp=False) == pytest.approx(flop, abs=0.005e9)


def test_v3s_mtp_module_has_the_published_numbers():
    parameters = count_parameters(preset("v3"))
    assert parameters.bias_entries == 14_848 + 256
    assert parameters.mtp_modules.total + 256 == 11_610_068_224
    layer = sum(count.total for part, count in parameters.mtp.items() if part not in ("eh_proj",)) - 3 * 7168
    assert layer + 256 == 11_507_286_272
    assert training_flop_per_token(preset("v3"), 4096) == pytest.approx(260.64e9, abs=0.005e9)
    assert parameters.total == 671_026_404_352 + 11_610_068_224 - 256


def variants() -> list[ModelConfig]:
    nano = compose(["nano"]).tree["model"]
    changes = [
        {},
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 2, "q_lora_rank": None},
        {"n_shared_experts": 0},
        {"first_k_dense_replace": 0, "tie_word_embeddings": True},
        {"first_k_dense_replace": 3, "n_shared_experts": 3},
    ]
    return [ModelConfig(**nano | change) for change in changes]


@pytest.mark.parametrize("model", variants())
def test_the_arithmetic_counts_what_the_model_has(model: ModelConfig):
    with torch.device("meta"):
        network = Transformer(model)
    parameters = count_parameters(model)
    assert parameters.total == sum(parameter.numel() for parameter in network.parameters())  # tied ones once
    assert parameters.bias_entries == sum(b.numel() for name, b in network.named_buffers() if "expert_bias" in name)


def test_flop_of_a_model_small_enough_for_paper():
    model = ModelConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=5, kv_lora_rank=3,
        qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2, first_k_dense_replace=1, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, max_position_embeddings=8,
    )  # fmt: skip
    attention = 8 * 4 + 8 * (3 + 2) + 3 * (2 + 2) + 2 * 8  # q, kv_a, kv_b, o
    dense, moe = 3 * 8 * 5, (2 + 1) * 3 * 8 * 16 + 8 * 4  # two routed experts and a shared one, and the router
    scores = 2 * 1 * (4 + 2) * 8  # layers · H · (d_qk + d_v) · T, causal half of 2 FLOP each
    assert forward_flop_per_token(model, 8) == 2 * (2 * attention + dense + moe + 10 * 8) + scores
    assert training_flop_per_token(model, 8) == 3 * forward_flop_per_token(model, 8)


def test_bytes_of_weights_gradients_and_optimizer():
    """Unsharded: bf16 weights have fp32 copies in the optimizer."""
    model = preset("nano")
    n, bias = count_parameters(model).total, count_parameters(model).bias_entries
    for precision, weights, optimizer in (("32", 4, 8), ("bf16-mixed", 4, 8), ("bf16", 2, 12)):
        memory = training_memory(model, 512, precision, "none")
        assert (memory.weights, memory.gradients, memory.optimizer) == (
            weights * n + 4 * bias,
            4 * n,
            optimizer * n,
        )
        assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations


@pytest.mark.parametrize(
    ("precision", "sharded", "moment", "averaged", "each"),
    [
        ("32", False, 4, False, 12),
        ("bf16", False, 4, False, 14),
        ("bf16", True, 2, False, 8),
        ("32", True, 4, True, 16),
    ],
)
def test_bytes_of_a_checkpoint(precision, sharded, moment, averaged, each):
    """Weights and AdamW's state per parameter; bf16 weights have fp32 copies in the optimizer, sharded ones none."""
    counts = count_parameters(preset("nano"))
    found = checkpoint_bytes(preset("nano"), precision, sharded, moment, averaged)
    assert found == each * counts.total + 4 * counts.bias_entries


MUON = r".*(_proj(_with_mqa)?\.weight|experts\.(gate_up|down)_proj)"


@pytest.mark.parametrize("model", variants())
def test_muons_matrices_have_one_momentum_and_the_shapes_of_the_model(model):
    with torch.device("meta"):
        found = {n: p for n, p in Transformer(model).named_parameters() if re.fullmatch(MUON, n)}
    share = whole_share(model)
    expected = Counter()
    for name, parameter in found.items():
        halves = 2 if name.endswith("experts.gate_up_proj") else 1
        rows, columns = parameter.shape[-2], parameter.shape[-1] // halves
        expected[min(rows, columns), max(rows, columns)] += parameter.numel() // (rows * columns)
    counted = Counter()
    for matrices in muon_matrices(model, share):
        counted[min(matrices[1:3]), max(matrices[1:3])] += matrices.number
    assert counted == expected
    numbers, total = sum(parameter.numel() for parameter in found.values()), count_parameters(model).total
    assert muon_parameters(model, share) == numbers
    for moment in (4, 2):
        memory = training_memory(model, 1, "32", "none", moment=moment, kind="muon")
        assert memory.optimizer == moment * (2 * total - numbers)
    products = sum(n * 5 * (2 * a * a * b + 2 * a * a * a + 2 * a * a * b) for (a, b), n in expected.items())
    assert newton_schulz_flop(model, share) == products


def test_the_estimate_of_activations_is_near_what_autograd_keeps():
    config = check(compose(["nano"], ["data.batch_size=16"]).tree)
    model, B, T = config.model, 16, config.data.sequence_length
    network = Transformer(model)
    network.init_weights(0)
    tokens = torch.randint(0, model.vocab_size, (B, T + 2))
    targets = torch.stack([tokens[:, 1 : 1 + T], tokens[:, 2 : 2 + T]], 1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding it keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.losses(tokens, torch.ones_like(tokens, dtype=torch.bool), targets)
    measured = sum(size for size, _ in kept.values())
    assert training_memory(model, B * T, "32", "none").activations == pytest.approx(measured, rel=0.15)


def test_checkpointing_keeps_less():
    kept = [activations(preset("v3"), 100, "bf16", policy).kept for policy in ("none", "selective", "full")]
    assert kept[0] > 1.5 * kept[1] > 1.5 * kept[2]
    again = [activations(preset("v3"), 100, "bf16", policy).made_again for policy in ("none", "selective", "full")]
    assert again[0] < again[1] < again[2]
    assert training_memory(preset("v3"), 100, "bf16", "full").activations == kept[2] + again[2]
