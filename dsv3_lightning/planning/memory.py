"""Bytes of one unsharded copy of a training run.

Exact: parameters, gradients, AdamW's moments and master weights. Estimate: activations, counted from what the layers
keep for their backward pass. Not counted: the allocator's slack, buffers of collectives, the data, the runtime itself.
"""

from dataclasses import dataclass

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.parameters import count_parameters

POLICIES = ("none", "selective", "full")


@dataclass(frozen=True)
class Memory:
    """Bytes. weights, gradients and optimizer are exact, activations are an estimate."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(model: ModelConfig, tokens: int, precision: str, policy: str) -> Memory:
    """For a micro-batch of `tokens` tokens on one rank.

    precision: `32` and `bf16-mixed` keep fp32 weights and gradients; `bf16` keeps both in two bytes and adds fp32
    master weights to AdamW's two fp32 moments. (Norms and routers stay fp32 there, a share of 1e-4 that is ignored.)
    """
    parameters = count_parameters(model)
    stored, moments = (2, 12) if precision == "bf16" else (4, 8)
    computed = 4 if precision == "32" else 2
    return Memory(
        weights=stored * parameters.total + 4 * parameters.bias_entries,
        gradients=stored * parameters.total,
        optimizer=moments * parameters.total,
        activations=tokens * computed * activations_per_token(model, policy),
    )


def activations_per_token(model: ModelConfig, policy: str) -> int:
    """Numbers kept per token from forward to backward pass, by the policies of compute.activation_checkpointing.

    `full` keeps each block's input and, at its peak, makes one block's own again.
    """
    D, dense = model.hidden_size, model.first_k_dense_replace
    layers = [dense_layer(model, policy)] * dense
    layers += [moe_layer(model, policy)] * (model.num_hidden_layers - dense + model.mtp_depth)
    heads = (1 + model.mtp_depth) * 3 * D  # final norm's input and output, and the gradient that the fused loss makes
    mtp = model.mtp_depth * 5 * D  # the embedding, its norm, the other norm, both joined
    peak = max(dense_layer(model, "none") if dense else 0, moe_layer(model, "none")) if policy != "none" else 0
    return sum(layers) + heads + (mtp if policy == "none" else 0) + peak


def cache_per_token(model: ModelConfig) -> int:
    """Numbers that decoding keeps per token, over all layers: MLA's latents and rotary keys (V3 §2.1.1), or k and v."""
    if model.attention == "mla":
        return model.num_hidden_layers * (model.kv_lora_rank + model.qk_rope_head_dim)
    shared = model.num_key_value_heads or model.num_attention_heads
    return model.num_hidden_layers * shared * (model.qk_head_dim + model.v_head_dim)


def dense_layer(model: ModelConfig, policy: str) -> int:
    return attention(model, policy) + swiglu(model.hidden_size, model.intermediate_size, policy)


def moe_layer(model: ModelConfig, policy: str) -> int:
    D, K, E, width = model.hidden_size, model.num_experts_per_tok, model.n_routed_experts, model.moe_intermediate_size
    routed = K * (swiglu(D, width, policy) + (2 * D if policy == "none" else 0))  # tokens as sent out and as collected
    shared = swiglu(D, model.n_shared_experts * width, policy) if model.n_shared_experts else 0
    router = {"none": 4 * E, "selective": E, "full": 0}[policy]  # scores, normalised scores, and their fp32 copies
    return attention(model, policy) + routed + shared + router


def attention(model: ModelConfig, policy: str) -> int:
    """With the block's input, both its norms and the residual between attention and FFN."""
    D, H = model.hidden_size, model.num_attention_heads
    if policy == "full":
        return D
    # queries, keys, values (padded to the wider of the two) and output of the fused kernel
    padded = H * max(model.qk_head_dim, model.v_head_dim)
    if model.attention == "gqa":
        shared = model.num_key_value_heads or H
        products = (H + shared) * model.qk_head_dim + shared * model.v_head_dim  # q, k and v before their rotation
        return D + products + padded + D if policy == "selective" else 4 * D + 4 * padded + H * model.v_head_dim
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank
    if policy == "selective":  # products: latents, expanded queries, keys and values, the kernel's output, o_proj
        expanded = padded + H * (model.qk_nope_head_dim + model.v_head_dim)
        return D + latents + model.qk_rope_head_dim + expanded + padded + D
    return 4 * D + 2 * latents + model.qk_rope_head_dim + 4 * padded + H * model.v_head_dim


def swiglu(hidden_size: int, width: int, policy: str) -> int:
    """gate and up, then the activated gate and the product; or only what the three products gave."""
    return {"none": 4 * width, "selective": 2 * width + hidden_size, "full": 0}[policy]
