"""Bytes of one unsharded copy of a training run.

Exact: parameters, gradients, AdamW's moments and master weights. Estimate: activations, counted from what the layers
keep for their backward pass. Not counted: the allocator's slack, buffers of collectives, the data, the runtime itself.
"""

from dataclasses import dataclass

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.activations import activations
from dsv3_lightning.planning.parameters import count_parameters


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


def training_memory(model: ModelConfig, tokens: int, precision: str, policy: str, sharded: bool = False) -> Memory:
    """For a micro-batch of `tokens` tokens on one rank.

    Weights and gradients are fp32, as AdamW's two moments are. Under precision `bf16` unsharded weights have two bytes
    and an fp32 copy in AdamW; sharded ones are fp32, and gathered in bf16. (Norms and routers always are fp32, a share
    of 1e-4 that is ignored.)
    """
    parameters = count_parameters(model)
    stored, moments = (2, 12) if precision == "bf16" and not sharded else (4, 8)
    per_token = activations(model, precision, policy)
    return Memory(
        weights=stored * parameters.total + 4 * parameters.bias_entries,
        gradients=4 * parameters.total,
        optimizer=moments * parameters.total,
        activations=tokens * (per_token.kept + per_token.made_again),
    )


def cache_per_token(model: ModelConfig) -> int:
    """Numbers that decoding keeps per token, over all layers: MLA's latents and rotary keys (V3 §2.1.1), or k and v."""
    if model.attention == "mla":
        return model.num_hidden_layers * (model.kv_lora_rank + model.qk_rope_head_dim)
    shared = model.num_key_value_heads or model.num_attention_heads
    return model.num_hidden_layers * shared * (model.qk_head_dim + model.v_head_dim)
