"""Parameters of the published models, counted on the meta device, and FLOP as torch's profiler counts them.

Totals: arithmetic on the released shapes (V3 arXiv 2412.19437 §4.2, V2 arXiv 2405.04434 §3.1.2 and B, Moonlight arXiv
2502.16982); those of V3, V2-Lite and Moonlight are also transformers'. "Active" counts embedding and head fully.
"""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dsv3_lightning.model.config import ModelConfig, Yarn
from dsv3_lightning.model.experts import Experts
from dsv3_lightning.model.router import Router
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.planning.flops import forward_flop_per_token, training_flop_per_token
from dsv3_lightning.planning.parameters import count_parameters

from .small import small_batch, small_config, small_model, total_loss

HEADS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False}
LITE = HEADS | {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1408,
}
MODELS = {
    "V3": HEADS
    | {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "first_k_dense_replace": 3,
        "intermediate_size": 18432,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 4096,
    },
    "V2": HEADS
    | SOFTMAX
    | {
        "vocab_size": 102400,
        "hidden_size": 5120,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "first_k_dense_replace": 1,
        "intermediate_size": 12288,
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1536,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "max_position_embeddings": 4096,
    },
    "V2-Lite": LITE
    | SOFTMAX
    | {"vocab_size": 102400, "intermediate_size": 10944, "topk_method": "greedy", "max_position_embeddings": 4096},
    "Moonlight": LITE
    | {
        "vocab_size": 163840,
        "intermediate_size": 11264,
        "routed_scaling_factor": 2.446,
        "max_position_embeddings": 8192,
        "rope_theta": 50000.0,
    },
}


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def active_parameters(model: Transformer) -> int:
    """Of the main model: all but the experts that a token isn't sent to."""
    K, E = model.config.num_experts_per_tok, model.config.n_routed_experts
    experts = sum(parameters(module) for module in model.layers.modules() if isinstance(module, Experts))
    return parameters(model) - parameters(model.mtp) - (experts // E * (E - K) if experts else 0)


@pytest.mark.parametrize(
    "name, total, active, bias_entries",
    [
        ("V3", 671_026_404_352, 37_552_282_624, 14_848),
        ("V2", 235_741_434_880, 21_375_800_320, 59 * 160),
        ("V2-Lite", 15_706_484_224, 2_661_150_208, 26 * 64),
        ("Moonlight", 15_960_108_544, 2_914_774_528, 1_664),
    ],
)
def test_published_models_have_their_published_sizes(name, total, active, bias_entries):
    # The biases are buffers here and in none of the counts; V2's and V2-Lite's stay 0 and aren't released.
    model = on_meta(ModelConfig(**MODELS[name]))
    assert parameters(model) - parameters(model.mtp) == total
    assert active_parameters(model) == active
    assert sum(b.numel() for b in model.layers.buffers()) == bias_entries


def test_v3s_mtp_module_has_its_published_size():
    # The released file has 11,610,068,224 own entries of it: with 256 of the expert bias, which is no parameter here,
    # and without its copies of embedding and head.
    model = on_meta(ModelConfig(**MODELS["V3"]))
    assert parameters(model.mtp) + sum(b.numel() for b in model.mtp.buffers()) == 11_610_068_224
    block = model.mtp[0].block
    assert parameters(block) + sum(b.numel() for b in block.buffers()) == 11_507_286_272


def multiplied_weights(model: Transformer) -> int:
    """Weights in the matrix products of one token, counted over the modules that hold them; one head per depth."""
    config, total = model.config, 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel() * (1 + config.mtp_depth if module is model.lm_head else 1)
        elif isinstance(module, Router):
            total += module.weight.numel()
        elif isinstance(module, Experts):
            total += parameters(module) * config.num_experts_per_tok // config.n_routed_experts
    return total


def attention_flop(model: Transformer, T: int) -> int:
    """Per token, forward: q k^T and p v over half the T x T square."""
    layers = model.config.num_hidden_layers + model.config.mtp_depth
    return layers * model.config.num_attention_heads * (model.config.qk_head_dim + model.config.v_head_dim) * T


@pytest.mark.parametrize(
    "name, depth, T, giga",
    [
        ("V3", 0, 4096, 250.45),
        ("V3", 1, 4096, 260.64),
        ("V2", 0, 4096, 155.30),
        ("V2-Lite", 0, 4096, 16.41),
        ("Moonlight", 0, 4096, 17.17),
        ("Moonlight", 0, 8192, 18.87),
    ],
)
def test_flop_per_trained_token_of_published_models(name, depth, T, giga):
    # Other counters agree: 249.5 (NeMo AutoModel) and 260 with MTP (Megatron Bridge) for V3, 17.2 for Moonlight.
    config = ModelConfig(**MODELS[name] | {"num_nextn_predict_layers": depth})
    model = on_meta(config)
    flop = 6 * multiplied_weights(model) + 3 * attention_flop(model, T)
    assert round(flop / 1e9, 2) == giga
    assert training_flop_per_token(config, T) == flop


def grouped_mm_flop(a_shape, b_shape, *_args, **_kwargs) -> int:
    """[S, D] x [E, D, F]: each row meets one matrix. [D, S] x [S, F], cut where groups end: each row counts once."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


COUNTED = {  # what runs on CPU and is unknown to the profiler of some versions
    torch.ops.aten._grouped_mm: grouped_mm_flop,
}


@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 2}, {"q_lora_rank": None, "n_shared_experts": 3}])
def test_flop_are_those_the_profiler_counts(changes):
    config = small_config(**changes)
    model, batch, B, T = small_model(config), small_batch(config, B=2, T=24), 2, 24
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as forward:
        loss = total_loss(model.losses(*batch), batch.targets)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as backward:
        loss.backward()
    forward_flop, backward_flop = (flop_by_kind(counter) for counter in (forward, backward))

    # Products with weights. The fused cross-entropy does its backward's two thirds in the forward pass.
    assert forward_flop["weights"] + backward_flop["weights"] == 6 * B * T * multiplied_weights(model)

    # Attention. The profiler counts the full square, of which half is needed.
    assert forward_flop["attention"] == 2 * B * T * attention_flop(model, T)
    assert backward_flop["attention"] == 2 * forward_flop["attention"]

    assert training_flop_per_token(config, T) == 6 * multiplied_weights(model) + 3 * attention_flop(model, T)
    if not config.mtp_depth:
        assert 3 * forward_flop_per_token(config, T) == training_flop_per_token(config, T)


def flop_by_kind(counter: FlopCounterMode) -> dict[str, int]:
    kinds = dict.fromkeys(("weights", "attention"), 0)
    for op, flop in counter.get_flop_counts()["Global"].items():
        name = str(op)
        kinds["attention" if "bmm" in name else "weights"] += flop
    return kinds


CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem not in ("base", "cleaning"))


@pytest.mark.parametrize(
    "config",
    [
        small_config(tie_word_embeddings=True),
        small_config(num_nextn_predict_layers=2),
        small_config(num_nextn_predict_layers=2, mtp_kind="parallel"),
    ],
)
def test_planned_counts_of_small_models_are_those_of_the_module(config):
    assert_planned_counts_are_the_modules(config)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_planned_counts_of_every_preset_are_those_of_the_module(path):
    fields = OmegaConf.to_container(merged(path).model, resolve=True)
    if fields.get("rope_scaling"):
        fields["rope_scaling"] = Yarn(**fields["rope_scaling"])
    assert_planned_counts_are_the_modules(ModelConfig(**fields))


def merged(path: Path):
    """The file over its defaults."""
    tree = OmegaConf.load(path)
    bases = [merged(path.parent / f"{name}.yaml") for name in tree.pop("defaults", [])]
    return OmegaConf.merge(*bases, tree)


def assert_planned_counts_are_the_modules(config: ModelConfig) -> None:
    model, planned = on_meta(config), count_parameters(config)
    mtp = parameters(model.mtp)
    assert planned.total == parameters(model)
    assert planned.mtp_modules.total == mtp
    assert planned.main_model.total == parameters(model) - mtp
    assert planned.bias_entries == sum(buffer.numel() for buffer in model.buffers())
    assert planned.active == active_parameters(model)
    assert training_flop_per_token(config, 64) == 6 * multiplied_weights(model) + 3 * attention_flop(model, 64)
