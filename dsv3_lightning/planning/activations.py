"""Activation memory: an estimate of the bytes per token saved for the backward pass, from the layers' code.

tests/training/test_dry_run.py compares it with the tensors of a dry run, which `dsv3 plan --gpus N --dry-run` counts.
"""

import functools
from dataclasses import dataclass

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.share import Share, whole_share


@dataclass(frozen=True)
class Activations:
    """Bytes per token. kept: saved by all blocks and heads. made_again: recomputed for one block's backward pass."""

    kept: int
    made_again: int


def activations(model: ModelConfig, precision: str, policy: str) -> Activations:
    """Bytes per token of a step. policy: compute.activation_checkpointing; all but `none` recompute block by block."""
    widths = widths_of(model, precision)
    combining = widths.combining() if model.num_moe_layers or model.mtp_depth else 0
    return Activations(widths.kept(whole_share(model), policy), widths.made_again(policy) + combining)


def widths_of(model: ModelConfig, precision: str) -> "Widths":
    return Widths(model, 4 if precision == "32" else 2, 2 if precision == "bf16" else 4)


@dataclass(frozen=True)
class Widths:
    """Bytes per token of layers. computed, residual: bytes of a number in products and in the residual stream."""

    model: ModelConfig
    computed: int
    residual: int

    def kept(self, share: Share, policy: str) -> int:
        """Bytes that the blocks and heads of a share keep for the backward pass."""
        blocks = share.dense * self.block(policy, moe=False) if share.dense else 0
        blocks += share.moe * self.block(policy, moe=True) if share.moe else 0
        blocks += share.mtp * self.mtp(policy) if share.mtp else 0
        return blocks + share.heads * (self.residual * self.model.hidden_size + self.head())

    def norm(self, size: int) -> int:
        """Bytes of a norm: fp32 input and normalized input, and the result. (Fused, as on GPUs: one fp32 less.)"""
        return 8 * size + self.computed * size

    def block(self, policy: str, moe: bool) -> int:
        model = self.model
        if policy == "full":
            return self.residual * model.hidden_size
        start = self.residual * model.hidden_size if policy == "selective" else 0
        return (
            start + self.attention(policy) + (self.moe(policy) if moe else self.swiglu(model.intermediate_size, policy))
        )

    def mtp(self, policy: str) -> int:
        """Bytes of an MTP module: embedding, both norms, the projection that joins them, and a block."""
        D = self.model.hidden_size
        if self.model.mtp_kind == "parallel":
            return self.block(policy, moe=True)
        if policy != "none":
            return (
                self.block(policy, moe=True) + self.residual * D + (self.computed * D if policy == "selective" else 0)
            )
        return self.block(policy, moe=True) + 2 * 8 * D + 2 * self.computed * D

    def made_again(self, policy: str) -> int:
        """Bytes that a block recomputes before its backward pass: the maximum over kinds of blocks."""
        kinds = [self.mtp] if self.model.mtp_depth else []
        kinds += [functools.partial(self.block, moe=True)] if self.model.num_moe_layers else []
        kinds += [functools.partial(self.block, moe=False)] if self.model.first_k_dense_replace else []
        return max(kind("none") - kind(policy) for kind in kinds)

    def head(self) -> int:
        """Bytes of a head: the final norm, and the gradient that the fused loss computes."""
        return self.norm(self.model.hidden_size) + self.computed * self.model.hidden_size

    def combining(self) -> int:
        """The gradients of a token's K expert outputs, while these are being combined."""
        return self.computed * self.model.num_experts_per_tok * self.model.hidden_size

    def moe(self, policy: str) -> int:
        model, c = self.model, self.computed
        D, K, E, F = model.hidden_size, model.num_experts_per_tok, model.n_routed_experts, model.moe_intermediate_size
        routed = K * (self.swiglu(F, policy) + (c * D if policy == "none" else 0))  # sorted
        shared = self.swiglu(model.n_shared_experts * F, policy) if model.n_shared_experts else 0
        router = 4 * E if policy == "selective" else 16 * E + (4 * D if c == 2 else 0)  # scores; the input in fp32
        return routed + shared + router

    def swiglu(self, width: int, policy: str) -> int:
        """Bytes of a SwiGLU: gate, up, activated gate and their product; or only the results of the matrix products."""
        return self.computed * (4 * width if policy == "none" else 2 * width + self.model.hidden_size)

    def attention(self, policy: str) -> int:
        """Bytes of attention, with both norms of the block."""
        model, c = self.model, self.computed
        D, H = model.hidden_size, model.num_attention_heads
        padded = H * max(model.qk_head_dim, model.v_head_dim)
        kernel = c * padded + 4 * H  # output and log-sum-exp
        latents = (
            []
            if model.attention == "gqa"
            else [model.kv_lora_rank, *([model.q_lora_rank] if model.q_lora_rank else [])]
        )
        if policy == "selective":
            shared = model.num_key_value_heads or H
            keys = H * (model.qk_nope_head_dim + model.v_head_dim) + model.qk_rope_head_dim
            if model.attention == "gqa":
                keys = shared * (model.qk_head_dim + model.v_head_dim)
            return c * (sum(latents) + H * model.qk_head_dim + keys + D) + kernel
        return 2 * self.norm(D) + sum(map(self.norm, latents)) + 3 * c * padded + kernel + c * H * model.v_head_dim
