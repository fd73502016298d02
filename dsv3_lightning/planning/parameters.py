"""Exact parameter counts by part, from the shapes (V3 §2.1, §2.2, §4.2).

`total` counts all trained parameters, `active` those used for one token: only the chosen ones of the routed experts;
embedding and head count fully.
"""

from dataclasses import dataclass
from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig


class Count(NamedTuple):
    total: int
    active: int

    def times(self, n: int) -> "Count":
        return Count(n * self.total, n * self.active)


@dataclass(frozen=True)
class Parameters:
    """Counts by part. main: the main model. mtp: MTP modules, without the embedding and head that they share with it.

    bias_entries: expert biases of all routers. They are buffers, not parameters, and in no other count.
    """

    main: dict[str, Count]
    mtp: dict[str, Count]
    bias_entries: int

    @property
    def main_model(self) -> Count:
        """The count of the main model, which is what inference needs."""
        return add(self.main)

    @property
    def mtp_modules(self) -> Count:
        return add(self.mtp)

    @property
    def total(self) -> int:
        """The count of all trained parameters."""
        return self.main_model.total + self.mtp_modules.total

    @property
    def active(self) -> int:
        """The count of the main model's parameters used for one token."""
        return self.main_model.active


def add(parts: dict[str, Count]) -> Count:
    return Count(sum(count.total for count in parts.values()), sum(count.active for count in parts.values()))


def count_parameters(model: ModelConfig) -> Parameters:
    D, V = model.hidden_size, model.vocab_size
    dense, moe = model.first_k_dense_replace, model.num_hidden_layers - model.first_k_dense_replace
    main = {
        "embedding": same(V * D),
        "attention": same(attention_weights(model)).times(model.num_hidden_layers),
        "dense FFN": same(swiglu(D, model.intermediate_size)).times(dense),
        **{part: count.times(moe) for part, count in moe_parts(model).items()},
        "norms": same(block_norms(model) * model.num_hidden_layers + D),
        "head": same(0 if model.tie_word_embeddings else V * D),
    }
    mtp = {
        "attention": same(attention_weights(model)),
        **moe_parts(model),
        "eh_proj": same(2 * D * D if model.mtp_kind == "sequential" else 0),
        "norms": same(block_norms(model) + mtp_norms(model)),
    }
    mtp = {part: count.times(model.mtp_depth) for part, count in mtp.items() if model.mtp_depth}
    return Parameters(main, mtp, model.num_moe_layers * model.n_routed_experts)


def parameter_split(model: ModelConfig) -> tuple[int, int]:
    """Numbers of parameters: all but routed experts, and routed experts."""
    parameters = count_parameters(model)
    routed = sum(part["routed experts"].total for part in (parameters.main, parameters.mtp) if "routed experts" in part)
    return parameters.total - routed, routed


def same(n: int) -> Count:
    return Count(n, n)


def swiglu(hidden_size: int, width: int) -> int:
    return 3 * hidden_size * width


def attention_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of the attention projections of one layer (V3 eq. 1-11; arXiv 2401.02954 §2.2)."""
    D, H, C, V = model.hidden_size, model.num_attention_heads, model.qk_head_dim, model.v_head_dim
    if model.attention == "gqa":
        shared = model.num_key_value_heads or H
        return [(H * C, D), (shared * C, D), (shared * V, D), (D, H * V)]
    rank, latent = model.q_lora_rank, model.kv_lora_rank
    queries = [(H * C, D)] if rank is None else [(rank, D), (H * C, rank)]
    compressed = [(latent + model.qk_rope_head_dim, D), (H * (model.qk_nope_head_dim + V), latent)]
    return [*queries, *compressed, (D, H * V)]


def attention_weights(model: ModelConfig) -> int:
    """The number of weights in these projections, without norms."""
    return sum(rows * columns for rows, columns in attention_shapes(model))


def block_norms(model: ModelConfig) -> int:
    """Norm weights of one layer: before attention, before the FFN, and of the latents."""
    return 2 * model.hidden_size + (model.q_lora_rank or 0) + model.kv_lora_rank


def mtp_norms(model: ModelConfig) -> int:
    """Weights of an MTP module's norms outside of its block: enorm, hnorm and the one before the head, or the last."""
    return (3 if model.mtp_kind == "sequential" else 1) * model.hidden_size


def moe_parts(model: ModelConfig) -> dict[str, Count]:
    """Counts by part of one MoE layer (V3 eq. 12-16)."""
    D = model.hidden_size
    expert = swiglu(D, model.moe_intermediate_size)
    return {
        "routed experts": Count(model.n_routed_experts * expert, model.num_experts_per_tok * expert),
        "shared experts": same(model.n_shared_experts * expert),
        "router": same(model.n_routed_experts * D),
    }
