"""Which model shapes are possible: the checks behind `Yarn` and `ModelConfig`. Imports no torch.

Every function raises ConfigError with the key, its value and what is valid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3_lightning.errors import ConfigError

if TYPE_CHECKING:
    from dsv3_lightning.model.config import ModelConfig, Yarn

POSITIVE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "qk_rope_head_dim",
    "v_head_dim", "n_group", "topk_group", "max_position_embeddings",
)  # fmt: skip
POSITIVE_WITH_EXPERTS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
NOT_NEGATIVE = ("qk_nope_head_dim", "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
ABOVE_ZERO = ("rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor")


def check_yarn(yarn: Yarn) -> None:
    if yarn.factor < 1:
        raise ConfigError(f"model.rope_scaling.factor={yarn.factor}: must be at least 1")
    if yarn.original_max_position_embeddings < 1:
        raise ConfigError(
            f"model.rope_scaling.original_max_position_embeddings={yarn.original_max_position_embeddings}: "
            "must be at least 1"
        )
    for name in ("beta_fast", "beta_slow"):
        if not getattr(yarn, name) > 0:
            raise ConfigError(f"model.rope_scaling.{name}={getattr(yarn, name)}: must be above 0")
    if yarn.beta_fast < yarn.beta_slow:
        raise ConfigError(f"model.rope_scaling.beta_fast={yarn.beta_fast}: must be at least beta_slow={yarn.beta_slow}")


def check_model(model: ModelConfig) -> None:
    for name in (*POSITIVE, *(POSITIVE_WITH_EXPERTS if model.num_moe_layers else ())):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name}={getattr(model, name)}: must be at least 1")
    for name in NOT_NEGATIVE:
        if getattr(model, name) < 0:
            raise ConfigError(f"model.{name}={getattr(model, name)}: must be at least 0")
    for name in ABOVE_ZERO:
        if not getattr(model, name) > 0:
            raise ConfigError(f"model.{name}={getattr(model, name)}: must be above 0")
    check_attention(model)
    if model.qk_rope_head_dim % 2:
        raise ConfigError(f"model.qk_rope_head_dim={model.qk_rope_head_dim}: rotary channels come in pairs")
    for name in ("hidden_size", "moe_intermediate_size"):
        if getattr(model, name) % 8:
            raise ConfigError(
                f"model.{name}={getattr(model, name)}: must be a multiple of 8 (torch's grouped matrix products)"
            )
    if model.first_k_dense_replace > model.num_hidden_layers:
        raise ConfigError(
            f"model.first_k_dense_replace={model.first_k_dense_replace}: "
            f"there are only num_hidden_layers={model.num_hidden_layers} layers"
        )
    if model.num_moe_layers:
        check_routing(model)


def check_attention(model: ModelConfig) -> None:
    """Each kind of attention has its own sizes, and not those of the other kind."""
    heads, shared = model.num_attention_heads, model.num_key_value_heads
    if model.q_lora_rank is not None and model.q_lora_rank < 1:
        raise ConfigError(f"model.q_lora_rank={model.q_lora_rank}: must be at least 1, or null for none")
    if model.attention == "mla":
        if model.kv_lora_rank < 1:
            raise ConfigError(f"model.kv_lora_rank={model.kv_lora_rank}: must be at least 1 with attention=mla")
        if shared not in (None, heads):
            raise ConfigError(
                f"model.num_key_value_heads={shared}: attention=mla has keys and values for all "
                f"num_attention_heads={heads}; leave it out, or set attention=gqa"
            )
        return
    for name, none in (("kv_lora_rank", 0), ("q_lora_rank", None)):
        if getattr(model, name) != none:
            raise ConfigError(
                f"model.{name}={getattr(model, name)}: attention=gqa compresses nothing; "
                f"set it to {'null' if none is None else none}"
            )
    if shared is None or shared < 1 or heads % shared:
        raise ConfigError(
            f"model.num_key_value_heads={'null' if shared is None else shared}: attention=gqa needs a number that "
            f"divides num_attention_heads={heads}"
        )


def check_routing(model: ModelConfig) -> None:
    experts, groups = model.n_routed_experts, model.n_group
    if experts % groups:
        raise ConfigError(f"model.n_group={groups}: does not divide n_routed_experts={experts} into equal groups")
    if model.topk_group > groups:
        raise ConfigError(f"model.topk_group={model.topk_group}: there are only n_group={groups} groups")
    if model.expert_bias_kind != "additive" and model.topk_method != "noaux_tc":
        raise ConfigError(
            f"model.expert_bias_kind={model.expert_bias_kind}: topk_method={model.topk_method} has no expert bias"
        )
    if model.topk_method == "greedy" and groups > 1:
        raise ConfigError(
            f"model.topk_method=greedy ignores groups, but n_group={groups}; use group_limited_greedy or n_group=1"
        )
    if model.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
        raise ConfigError(
            f"model.n_group={groups}: a group of noaux_tc is scored by its two best experts, "
            f"but would hold {experts // groups}"
        )
    allowed = experts // groups * model.topk_group
    if model.num_experts_per_tok > allowed:
        raise ConfigError(
            f"model.num_experts_per_tok={model.num_experts_per_tok}: "
            f"the topk_group={model.topk_group} allowed groups hold {allowed} experts"
        )
