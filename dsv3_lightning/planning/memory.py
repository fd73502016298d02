"""Memory of training without sharding, in bytes.

Exact: parameters, gradients, the optimizer's state and master weights. Estimated: activations, from what the layers
save for the backward pass. Not counted: allocator overhead, communication buffers, data, and the runtime itself.
"""

from dataclasses import dataclass

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.activations import activations
from dsv3_lightning.planning.matrices import muon_parameters
from dsv3_lightning.planning.parameters import count_parameters
from dsv3_lightning.planning.share import whole_share


@dataclass(frozen=True)
class Memory:
    """Bytes of a training run. weights, gradients and optimizer are exact; activations are an estimate."""

    weights: int
    gradients: int
    optimizer: int
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(
    model: ModelConfig, tokens: int, precision: str, policy: str, sharded: bool = False, moment: int = 4,
    kind: str = "adamw", fp8: bool | str = False,
) -> Memory:  # fmt: skip
    """Memory for a micro-batch of `tokens` tokens on one rank.

    Weights and gradients are fp32. With precision `bf16` unsharded weights are bf16 with an fp32 copy in the optimizer;
    sharded ones are fp32 and gathered in bf16. (Norms and routers are always fp32; they are 1e-4 of all and ignored.)
    moment: bytes of a number in AdamW's two moments, or in Muon's momentum, which its matrices have in their place.
    kind: the optimizer's. fp8: compute.fp8.
    """
    parameters = count_parameters(model)
    stored, copies = (2, 4) if precision == "bf16" and not sharded else (4, 0)
    single = muon_parameters(model, whole_share(model)) if kind == "muon" else 0
    held = activations(model, tokens, precision, policy, fp8=fp8)
    return Memory(
        weights=stored * parameters.total + 4 * parameters.bias_entries,
        gradients=4 * parameters.total,
        optimizer=(2 * moment + copies) * parameters.total - moment * single,
        activations=held.kept + held.made_again,
    )


def checkpoint_bytes(
    model: ModelConfig, precision: str, sharded: bool, moment: int, copies: int, kind: str = "adamw"
) -> int:  # fmt: skip
    """Bytes of a checkpoint: weights, optimizer state, the routers' biases and `copies` of the weights in fp32, such as
    their average."""
    memory = training_memory(model, 0, precision, "none", sharded, moment, kind)
    return memory.weights + memory.optimizer + copies * memory.gradients


def cache_per_token(model: ModelConfig) -> int:
    """Cached numbers per token over all layers: MLA's latents and rotary keys (V3 §2.1.1), or keys and values."""
    if model.attention == "mla":
        return model.num_hidden_layers * (model.kv_lora_rank + model.qk_rope_head_dim)
    shared = model.num_key_value_heads or model.num_attention_heads
    return model.num_hidden_layers * shared * (model.qk_head_dim + model.v_head_dim)
