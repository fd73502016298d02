"""Activation memory: an estimate of the bytes per token saved for the backward pass, from the layers' code.

tests/training/test_kept_by_blocks.py compares it with what a block holds after a pass on fake tensors, and
tests/training/test_dry_run.py a whole step with a dry run, which `dsv3 plan --gpus N --dry-run` counts.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.parameters import attention_shapes, moe_parts
from dsv3_lightning.planning.share import Share, linear_weights, whole_share

TILED = 1 + 4 / 128  # bytes of a number in FP8, with its share of a tile's scale
BLOCKED = 1 + 4 / 128**2  # of a weight
PLACE = 8  # bytes of a row's place in an order of tokens, int64
CHOICE = 4 + 8  # bytes of one of a router's choices: a score in fp32, a number in int64
GATE = 16  # bytes of a gate that travels with its token, as in parallel/messages.py


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch. kept: saved by blocks and heads. made_again: recomputed for one block's backward pass."""

    kept: float
    made_again: float


def activations(
    model: ModelConfig, tokens: int, precision: str, policy: str, ep: int = 1, fp8: bool | str = False
) -> Activations:
    """Bytes of a micro-batch of the whole model. policy: compute.activation_checkpointing; all but `none` recompute
    block by block. ep: ranks that share the experts. fp8: compute.fp8.
    """
    return widths_of(model, precision, ep, fp8).micro_batch(whole_share(model), tokens, policy)


def widths_of(model: ModelConfig, precision: str, ep: int = 1, fp8: bool | str = False) -> "Widths":
    return Widths(model, 4 if precision == "32" else 2, 2 if precision == "bf16" else 4, ep, fp8)


@dataclass(frozen=True)
class Widths:
    """Bytes per token of layers. computed, residual: bytes of a number in products and in the residual stream.

    ep: ranks that share the experts. fp8: compute.fp8, of all linear layers of blocks; `emulated` also of the experts.
    """

    model: ModelConfig
    computed: int
    residual: int
    ep: int
    fp8: bool | str

    def micro_batch(self, share: Share, tokens: int, policy: str) -> Activations:
        """Bytes of a micro-batch in this share. In FP8 also of weights, which are rounded for each micro-batch."""
        kept = tokens * self.kept(share, policy)
        again = tokens * (self.made_again(policy) + (self.combining() if share.moe_layers else 0))
        if policy == "none":
            return Activations(kept + self.rounded_weights(share), again)
        one = [Share(1, 0, 0, 0, 0), Share(0, 1, 0, 0, 0)][not share.dense : 1 + bool(share.moe_layers)]
        return Activations(kept, again + max(map(self.rounded_weights, one)))

    def kept(self, share: Share, policy: str) -> float:
        """Bytes that the blocks and heads of a share keep for the backward pass."""
        blocks = share.dense * self.block(policy, moe=False) if share.dense else 0
        blocks += share.moe * self.block(policy, moe=True) if share.moe else 0
        blocks += share.mtp * self.mtp(policy) if share.mtp else 0
        return blocks + share.heads * (self.residual * self.model.hidden_size + self.head())

    def block(self, policy: str, moe: bool) -> float:
        model = self.model
        start = 0 if policy == "none" else self.residual * model.hidden_size
        if policy != "none" and moe:
            start += self.choices()
        if policy == "full":
            return start
        ffn = self.moe(policy) if moe else self.swiglu(model.intermediate_size, policy)
        return start + self.attention(policy) + ffn

    def mtp(self, policy: str) -> float:
        """Bytes of an MTP module: embedding, both norms, the projection that joins them, and a block."""
        D = self.model.hidden_size
        if self.model.mtp_kind == "parallel":
            return self.block(policy, moe=True)
        if policy != "none":
            return (
                self.block(policy, moe=True) + self.residual * D + (self.computed * D if policy == "selective" else 0)
            )
        return self.block(policy, moe=True) + 2 * norm(D) + 2 * self.computed * D

    def made_again(self, policy: str) -> float:
        """Bytes that a block recomputes before its backward pass: the maximum over kinds of blocks."""
        kinds = [self.mtp] if self.model.mtp_depth else []
        kinds += [functools.partial(self.block, moe=True)] if self.model.num_moe_layers else []
        kinds += [functools.partial(self.block, moe=False)] if self.model.first_k_dense_replace else []
        return max(kind("none") - kind(policy) for kind in kinds)

    def head(self) -> float:
        """Bytes of a head: the final norm, its result, and the gradient that the fused loss computes."""
        D = self.model.hidden_size
        return norm(D) + 2 * self.computed * D

    def combining(self) -> int:
        """The gradients of a token's K expert outputs, while these are being combined."""
        return self.computed * self.model.num_experts_per_tok * self.model.hidden_size

    def moe(self, policy: str) -> float:
        model, c = self.model, self.computed
        D, K, E, F = model.hidden_size, model.num_experts_per_tok, model.n_routed_experts, model.moe_intermediate_size
        shared = self.swiglu(model.n_shared_experts * F, policy) if model.n_shared_experts else 0
        if policy == "selective":  # what has arrived, and gate and up; nothing of what follows
            return shared + 4 * E + K * (2 * F * self.result(True) + (c * D + GATE if self.ep > 1 else 0))
        routed = K * (2 * F * c + self.input(D, experts=True) + self.input(F, experts=True))
        own = c == 2 or self.fp8 or not shared  # the router's input in fp32, unless the shared experts have it
        return shared + routed + 16 * E + (4 * D if own else 0)

    def choices(self) -> int:
        """Bytes of what is never computed again: a router's choices, and where its tokens went and go back."""
        model, K = self.model, self.model.num_experts_per_tok
        best = 2 if model.topk_method == "noaux_tc" else 1
        of_groups = model.n_group * best + model.topk_group if model.n_group > 1 else 0
        return CHOICE * (K + of_groups) + PLACE * K * (2 if self.ep > 1 else 1)

    def swiglu(self, width: int, policy: str) -> float:
        """Bytes of a SwiGLU: its input, gate, up, activated gate and their product; or the results of its products."""
        D = self.model.hidden_size
        if policy == "selective":
            return self.result() * (2 * width + D)
        return self.input(D, products=2) + 3 * self.computed * width + self.input(width)

    def attention(self, policy: str) -> float:
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
            return self.result() * (sum(latents) + H * model.qk_head_dim + keys + D) + kernel
        norms = 2 * norm(D) + sum(map(norm, latents))
        return norms + self.inputs(attention_shapes(model)) + 3 * c * padded + kernel

    def inputs(self, shapes: Sequence[tuple[int, int]]) -> float:
        """Bytes of the inputs of attention's projections, (out, in) each; the first ones have the block's."""
        columns = [size for _, size in shapes[:-1]]
        reading = columns.count(self.model.hidden_size)
        others = [size for size in columns if size != self.model.hidden_size]
        return self.input(self.model.hidden_size, reading) + sum(map(self.input, [*others, shapes[-1][1]]))

    def input(self, size: int, products: int = 1, experts: bool = False) -> float:
        """Bytes of the input of so many products: kept once, or in FP8 once for each of them."""
        return products * size * TILED if self.rounds(experts) else self.computed * size

    def gradient(self, size: int, experts: bool = False) -> float:
        """Bytes of the gradient of a product's output, while it waits for that of the weight."""
        return size * (TILED if self.rounds(experts) else self.computed)

    def result(self, experts: bool = False) -> int:
        """Bytes of a number of a product's result, before it is cast."""
        return 4 if self.fp8 == "emulated" else self.computed

    def rounds(self, experts: bool) -> bool:
        return self.fp8 == "emulated" if experts else bool(self.fp8)

    def between_parts(self, share: Share) -> float:
        """Bytes that a share holds between the two parts of a split backward pass (model/weight_grad.py): the inputs of
        all products and the gradients of their outputs."""
        model, D, shapes = self.model, self.model.hidden_size, attention_shapes(self.model)
        K, F = model.num_experts_per_tok, model.moe_intermediate_size
        attention = self.inputs(shapes) + sum(self.gradient(rows) for rows, _ in shapes)

        def feed_forward(width: int, experts: bool = False) -> float:
            inputs = self.input(D, 1 if experts else 2, experts) + self.input(width, 1, experts)
            return inputs + self.gradient(2 * width + D, experts)

        moe = K * feed_forward(F, experts=True)
        moe += feed_forward(model.n_shared_experts * F) if model.n_shared_experts else 0
        joining = 3 * self.computed * D if model.mtp_kind == "sequential" else 0
        dense = share.dense * feed_forward(model.intermediate_size)
        return share.layers * attention + dense + share.moe_layers * moe + share.mtp * joining

    def rounded_weights(self, share: Share) -> float:
        """Bytes of weights in FP8, which a micro-batch keeps beside its inputs until its backward pass."""
        if not self.fp8:
            return 0
        routed = moe_parts(self.model)["routed experts"].total // self.ep if self.rounds(experts=True) else 0
        return BLOCKED * (linear_weights(self.model, share) + share.moe_layers * routed)


def norm(size: int) -> int:
    """Bytes of a norm, but for its result: input and normalized input in fp32. (Fused, as on GPUs: half of it.)"""
    return 8 * size
