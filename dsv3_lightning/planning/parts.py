"""Seconds of an optimizer step by part, for the slowest rank: what computes. What travels is in wires.py.

Every function takes (model, hardware, layout) and returns parts; `wires.parts` puts them together. A pipeline is one
more such function, another precision more rates in `coefficients.TABLE`.
"""

from collections.abc import Callable
from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning import passes
from dsv3_lightning.planning.hardware import Hardware
from dsv3_lightning.planning.layout import Layout
from dsv3_lightning.planning.parameters import attention_weights, count_parameters, moe_parts, swiglu
from dsv3_lightning.planning.passes import Passes


class Part(NamedTuple):
    """A part of a step. seconds: of a whole step. hidden_under: names of the parts that run at the same time.

    source: names of the coefficients that its seconds follow from.
    """

    name: str
    seconds: float
    hidden_under: tuple[str, ...]
    source: tuple[str, ...]


Parts = Callable[[ModelConfig, Hardware, Layout], list[Part]]
WIDE = 4096  # from this width on a product counts as wide
# The parts that gathers are hidden under. Exchanges of tokens are not among them, since they use the same wires.
COMPUTING = (
    "attention", "routed experts", "projections, dense layers", "shared experts", "routers, in fp32",
    "norms, rotations, activations", "sorting of tokens", "output head and loss",
)  # fmt: skip


def moe_layers(model: ModelConfig) -> int:
    """MoE layers, with those of MTP modules."""
    return count_parameters(model).bias_entries // model.n_routed_experts if model.n_routed_experts else 0


def all_layers(model: ModelConfig) -> int:
    return model.num_hidden_layers + model.mtp_depth


def product_rate(hardware: Hardware, precision: str, width: int, name: str | None = None) -> tuple[float, str]:
    """FLOP/s of matrix products with this width, and the name of the coefficient."""
    if precision == "32":
        return hardware.gpu.peak_fp32 * hardware.rate("products.fp32"), "products.fp32"
    name = name or ("products.wide" if width >= WIDE else "products.narrow")
    return hardware.rate(name), name


def attention(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """The attention kernel: two products forward, five backward, over the positions that the kernel doesn't skip."""
    work, code = layout.work, layout.code
    C, V = model.qk_head_dim, model.v_head_dim
    if code.attention == "flash":
        V = C = max(C, V)
    seen = work.sequence_length / 2  # of a causal square
    if work.documents is not None and code.attention != "efficient":
        seen = min(seen, work.documents / 2)
    if code.attention == "efficient":  # a mask doesn't let it skip anything
        seen = work.sequence_length
    tokens = work.tokens * work.micro_batches * all_layers(model) * model.num_attention_heads
    forward, backward = 2 * seen * (C + V) * tokens, 2 * seen * (3 * C + 2 * V) * tokens
    names = tuple(f"attention.{code.attention}.{way}" for way in ("forward", "backward"))
    if work.precision == "32":
        rate, name = product_rate(hardware, "32", 0)
        return [Part("attention", ((1 + layout.again.attention) * forward + backward) / rate, (), (name,))]
    seconds = (1 + layout.again.attention) * forward / hardware.rate(names[0]) + backward / hardware.rate(names[1])
    return [Part("attention", seconds, (), names)]


def experts(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Grouped products of the routed experts on the rank with the most tokens."""
    if not moe_layers(model):
        return []
    work = layout.work
    weights = moe_parts(model)["routed experts"].active * moe_layers(model)
    flop = 2 * weights * work.tokens * work.micro_batches * layout.imbalance
    rate, name = product_rate(hardware, work.precision, 0, "products.grouped")
    return [Part("routed experts", (3 + layout.again.experts) * flop / rate, (), (name,))]


def products(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Every other product of the blocks: projections, shared experts, dense layers, and the routers in fp32."""
    work, D = layout.work, model.hidden_size
    moe, tokens = moe_layers(model), work.tokens * work.micro_batches
    shared = moe_parts(model)["shared experts"].active * moe if moe else 0
    other = attention_weights(model) * all_layers(model)
    other += swiglu(D, model.intermediate_size) * (all_layers(model) - moe)
    other += 2 * D * D * model.mtp_depth if model.mtp_kind == "sequential" else 0
    rate, name = product_rate(hardware, work.precision, D)
    times = (3 + layout.again.products) * 2 * tokens / rate
    found = [Part("projections, dense layers", times * other, (), (name,))]
    if shared:
        found.append(Part("shared experts", times * shared, (), (name,)))
    if moe:
        flop = 2 * model.n_routed_experts * D * moe * tokens
        rate, name = product_rate(hardware, "32", D)
        found.append(Part("routers, in fp32", (3 + layout.again.products) * flop / rate, (), (name,)))
    return found


def elementwise(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Norms, rotations, activations, residual sums and router scores: bytes through the GPU's memory."""
    work, code, D = layout.work, layout.code, model.hidden_size
    c, r = work.computed, work.residual
    moe, layers = moe_layers(model), all_layers(model)
    latents = 0 if model.attention == "gqa" else model.kv_lora_rank + (model.q_lora_rank or 0)
    block = passes.norm(c, r, code.fused).times(2 * D) + passes.norm(c, c, code.fused).times(latents)
    block += passes.residual(c, r).times(2 * D)
    block += passes.attention_copies(model, c, code.fused, padded=code.attention == "flash")
    total = block.times(layers)
    total += passes.swiglu(model.intermediate_size, c, code.fused, joined=False).times(layers - moe)
    if moe:
        F, imbalance = model.moe_intermediate_size, layout.imbalance
        routed = passes.swiglu(model.num_experts_per_tok * F, c, code.fused, joined=True).times(imbalance)
        shared = passes.swiglu(model.n_shared_experts * F, c, code.fused, joined=False)
        joining = Passes(3 * c * D, 0)  # routed and shared results
        total += (routed + shared + passes.router(model, c, code.fused) + joining).times(moe)
    again = layout.again.memory
    moved = ((1 + again) * total.forward + total.backward) * work.tokens * work.micro_batches
    return [Part("norms, rotations, activations", moved / hardware.memory_rate, (), ("memory.share",))]


def sorting(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Routed tokens brought into the order of their experts and back, with their gates."""
    moe, work, code = moe_layers(model), layout.work, layout.code
    if not moe:
        return []
    rows = work.tokens * work.micro_batches * moe * model.num_experts_per_tok * layout.imbalance
    by_rows = passes.ROW_PASSES["local" if layout.mesh.ep == 1 and code.rows != "fused" else code.rows]
    moved = rows * model.hidden_size * work.computed
    moved *= (1 + layout.again.rows) * by_rows.forward + by_rows.backward
    seconds = moved / hardware.memory_rate
    names: tuple[str, ...] = ("memory.share",)
    if code.rows != "fused":
        sorts = (1 if layout.mesh.ep == 1 else 2) * (1 + layout.again.rows)
        seconds += sorts * rows / hardware.rate("sort.keys")
        names += ("sort.keys",)
    return [Part("sorting of tokens", seconds, (), names)]


def host_waits(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """The host waits for token counts before it can start the exchange or the products."""
    moe = moe_layers(model)
    if not moe:
        return []
    count = layout.code.syncs * moe * (1 + bool(layout.again.exchange)) * layout.work.micro_batches
    return [Part("host waits for counts", count * hardware.rate("host.sync"), (), ("host.sync",))]


def head(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Output layers and losses: three products, passes over the logits, and the weight gradient added up in fp32."""
    work, code, V, D = layout.work, layout.code, model.vocab_size, model.hidden_size
    heads, tokens = 1 + model.mtp_depth, work.tokens * work.micro_batches
    rate, name = product_rate(hardware, work.precision, max(V, D))
    seconds = 3 * 2 * V * D * tokens * heads / rate
    moved = sum(passes.logits(work.computed, code.fused)) * V * tokens * heads
    if code.logits is not None:
        chunk = max(code.least_tokens, code.logits // V)
        chunks = -(-work.tokens // chunk) * work.micro_batches * heads
        moved += code.fp32_passes * chunks * V * D
    return [Part("output head and loss", seconds + moved / hardware.memory_rate, (), (name, "memory.share"))]


def optimizer(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """AdamW on this rank's share, with the gradient's norm and clipping."""
    numbers = count_parameters(model).total / layout.mesh.dp_shard
    if layout.strategy.cpu_offload:
        return []
    gradient, moment = layout.code.gradient, layout.work.moment
    each = passes.ADAMW if (gradient, moment) == (4, 4) else passes.adamw(gradient, moment)
    return [Part("optimizer", each * numbers / hardware.memory_rate, (), ("memory.share",))]


COMPUTE: tuple[Parts, ...] = (attention, experts, products, elementwise, sorting, host_waits, head, optimizer)
