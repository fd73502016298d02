"""Seconds of an optimizer step by part, for the slowest rank: what computes. What travels is in wires.py.

Every function takes (model, hardware, layout) and returns parts; `wires.parts` puts them together. Another precision is
more rates in `coefficients.TABLE`. A pipeline takes the seconds by pass, of the share of the model in each chunk.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning import passes
from dsv3_lightning.planning.hardware import Hardware
from dsv3_lightning.planning.layout import Layout
from dsv3_lightning.planning.matrices import muon_parameters, newton_schulz_flop
from dsv3_lightning.planning.parameters import attention_weights, moe_parts, swiglu
from dsv3_lightning.planning.passes import Passes
from dsv3_lightning.planning.share import Share, linear_weights, share_parameters, whole_share


class Ways(NamedTuple):
    """Seconds by pass: forward; the backward pass's input part, with what it computes again; its weight part."""

    forward: float
    inputs: float
    weights: float


class Part(NamedTuple):
    """A part of a step. seconds: of a whole step. hidden_under: names of the parts that run at the same time.

    source: names of the coefficients that its seconds follow from. ways: the seconds by pass; None: once per step.
    """

    name: str
    seconds: float
    hidden_under: tuple[str, ...]
    source: tuple[str, ...]
    ways: Ways | None = None


Parts = Callable[[ModelConfig, Hardware, Layout], list[Part]]
WIDE = 4096  # from this width on a product counts as wide
# What gathers run beside. Exchanges of tokens are not among it: they use the same wires.
COMPUTING = (
    "attention", "routed experts", "projections, dense layers", "shared experts", "routers, in fp32",
    "norms, rotations, activations", "sorting of tokens", "output head and loss",
)  # fmt: skip


def part(name: str, ways: Ways, source: tuple[str, ...], hidden_under: tuple[str, ...] = ()) -> Part:
    return Part(name, sum(ways), hidden_under, source, ways)


def share_of(model: ModelConfig, layout: Layout) -> Share:
    """What the rank computes of the model."""
    return layout.share or whole_share(model)


def product_rate(hardware: Hardware, layout: Layout, width: int, kind: str = "") -> tuple[float, str]:
    """FLOP/s of matrix products with this width, and the name of the coefficient. kind: `grouped`, `fp32` or none."""
    tiles = layout.code.fp8
    rounded = tiles is not None and (kind != "grouped" or tiles.experts)
    if kind == "fp32" or (layout.work.precision == "32" and not rounded):
        return hardware.gpu.peak_fp32 * hardware.rate("products.fp32"), "products.fp32"
    name = f"products.{kind or ('wide' if width >= WIDE else 'narrow')}"
    if rounded:
        name += ".fp8"
    return hardware.rate(name), name


def multiplied(flop: float, again: float, rate: float) -> Ways:
    """Seconds of products: forward, and as many FLOP for the inputs' gradients and for the weights'."""
    return Ways(flop / rate, (1 + again) * flop / rate, flop / rate)


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
    tokens = work.tokens * work.micro_batches * share_of(model, layout).layers * model.num_attention_heads
    forward, backward = 2 * seen * (C + V) * tokens, 2 * seen * (3 * C + 2 * V) * tokens
    names: tuple[str, ...] = tuple(f"attention.{code.attention}.{way}" for way in ("forward", "backward"))
    rates = [hardware.rate(name) for name in names]
    if work.precision == "32":
        rate, name = product_rate(hardware, layout, 0, "fp32")
        rates, names = [rate, rate], (name,)
    again = layout.again.attention * forward / rates[0]
    return [part("attention", Ways(forward / rates[0], again + backward / rates[1], 0.0), names)]


def experts(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Grouped products of the routed experts on the rank with the most tokens."""
    moe = share_of(model, layout).moe_layers
    if not moe:
        return []
    work = layout.work
    weights = moe_parts(model)["routed experts"].active * moe
    flop = 2 * weights * work.tokens * work.micro_batches * layout.imbalance
    rate, name = product_rate(hardware, layout, model.hidden_size, "grouped")
    return [part("routed experts", multiplied(flop, layout.again.experts, rate), (name,))]


def products(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Every other product of the blocks: projections, shared experts, dense layers, and the routers in fp32."""
    work, D, share = layout.work, model.hidden_size, share_of(model, layout)
    moe, tokens, again = share.moe_layers, work.tokens * work.micro_batches, layout.again.products
    other = attention_weights(model) * share.layers
    other += swiglu(D, model.intermediate_size) * share.dense
    other += 2 * D * D * share.mtp if model.mtp_kind == "sequential" else 0
    rate, name = product_rate(hardware, layout, D)
    found = [part("projections, dense layers", multiplied(2 * other * tokens, again, rate), (name,))]
    if moe and model.n_shared_experts:
        shared = moe_parts(model)["shared experts"].active * moe
        found.append(part("shared experts", multiplied(2 * shared * tokens, again, rate), (name,)))
    if moe:
        flop = 2 * model.n_routed_experts * D * moe * tokens
        rate, name = product_rate(hardware, layout, D, "fp32")
        found.append(part("routers, in fp32", multiplied(flop, again, rate), (name,)))
    return found


def elementwise(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Norms, rotations, activations, residual sums and router scores: bytes through the GPU's memory."""
    work, code, D, share = layout.work, layout.code, model.hidden_size, share_of(model, layout)
    c, r = work.computed, work.residual
    moe, layers = share.moe_layers, share.layers
    latents = 0 if model.attention == "gqa" else model.kv_lora_rank + (model.q_lora_rank or 0)
    block = passes.norm(c, r, code.fused).times(2 * D) + passes.norm(c, c, code.fused).times(latents)
    block += passes.residual(c, r).times(2 * D)
    block += passes.attention_copies(model, c, code.fused, padded=code.attention == "flash")
    total = block.times(layers)
    total += passes.swiglu(model.intermediate_size, c, code.fused, joined=False).times(share.dense)
    if moe:
        F, imbalance = model.moe_intermediate_size, layout.imbalance
        routed = passes.swiglu(model.num_experts_per_tok * F, c, code.fused, joined=True).times(imbalance)
        shared = passes.swiglu(model.n_shared_experts * F, c, code.fused, joined=False)
        joining = Passes(3 * c * D, 0)  # routed and shared results
        total += (routed + shared + passes.router(model, c, code.fused) + joining).times(moe)
    found = [passed("norms, rotations, activations", total, layout.again.memory, hardware, layout)]
    if code.fp8:
        plain = not code.fp8.kernels
        quantized = passes.rounding(model) if plain else passes.quantization(model, code.fused, layout.imbalance)
        total = quantized.dense.times(share.dense) + quantized.moe.times(moe)
        total += quantized.attention.times(layers)
        if plain:  # also the weights', which micro-batches share out among their tokens
            weights = linear_weights(model, share)
            total += Passes(passes.ROUND * weights / work.tokens, 0)
        again = layout.again.memory if plain else layout.again.products
        found.append(passed("tiles in FP8 and back", total, again, hardware, layout))
    return found


def passed(name: str, total: Passes, again: float, hardware: Hardware, layout: Layout) -> Part:
    """A part that is bytes per token through the GPU's memory."""
    seconds = layout.work.tokens * layout.work.micro_batches / hardware.memory_rate
    ways = Ways(total.forward * seconds, (again * total.forward + total.backward) * seconds, 0.0)
    return part(name, ways, ("memory.share",))


def sorting(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Routed tokens brought into the order of their experts and back, with their gates."""
    moe, work, code = share_of(model, layout).moe_layers, layout.work, layout.code
    if not moe:
        return []
    rows = work.tokens * work.micro_batches * moe * model.num_experts_per_tok * layout.imbalance
    by_rows = passes.ROW_PASSES["local" if layout.mesh.ep == 1 and code.rows != "fused" else code.rows]
    row = rows * model.hidden_size * work.computed / hardware.memory_rate
    again = layout.again.rows
    forward, inputs = by_rows.forward * row, (again * by_rows.forward + by_rows.backward) * row
    names: tuple[str, ...] = ("memory.share",)
    if code.rows != "fused":
        sort = (1 if layout.mesh.ep == 1 else 2) * rows / hardware.rate("sort.keys")
        forward, inputs = forward + sort, inputs + again * sort
        names += ("sort.keys",)
    return [part("sorting of tokens", Ways(forward, inputs, 0.0), names)]


def host_waits(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """The host waits for token counts before it can start the exchange or the products."""
    moe = share_of(model, layout).moe_layers
    if not moe:
        return []
    once = layout.code.syncs * moe * layout.work.micro_batches * hardware.rate("host.sync")
    ways = Ways(once, bool(layout.again.exchange) * once, 0.0)
    return [part("host waits for counts", ways, ("host.sync",))]


def head(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """Output layers and losses: three products, passes over the logits, and the weight gradient added up in fp32.

    All of it is in the forward pass, which computes the gradients (model/fused_loss.py).
    """
    work, code, V, D = layout.work, layout.code, model.vocab_size, model.hidden_size
    heads, tokens = share_of(model, layout).heads, work.tokens * work.micro_batches
    if not heads:
        return []
    exact = replace(layout, code=replace(code, fp8=None))  # the report's too (V3 §3.3.1)
    rate, name = product_rate(hardware, exact, max(V, D))
    seconds = 3 * 2 * V * D * tokens * heads / rate
    moved = sum(passes.logits(work.computed, code.fused)) * V * tokens * heads
    if code.logits is not None:
        chunk = max(code.least_tokens, code.logits // V)
        chunks = -(-work.tokens // chunk) * work.micro_batches * heads
        moved += code.fp32_passes * chunks * V * D
    ways = Ways(seconds + moved / hardware.memory_rate, 0.0, 0.0)
    return [part("output head and loss", ways, (name, "memory.share"))]


def optimizer(model: ModelConfig, hardware: Hardware, layout: Layout) -> list[Part]:
    """The optimizer on this rank's share, with the gradient's norm and clipping; Muon's matrices each on one rank."""
    if layout.strategy.cpu_offload:
        return []
    work, share, shards = layout.work, share_of(model, layout), layout.mesh.dp_shard
    numbers = sum(share_parameters(model, share)) / shards
    gradient, moment = layout.code.gradient, work.moment
    each = passes.ADAMW if (gradient, moment) == (4, 4) else passes.adamw(gradient, moment)
    if work.kind == "adamw":
        return [Part("optimizer", each * numbers / hardware.memory_rate, (), ("memory.share",))]
    own = muon_parameters(model, share) / shards
    moved = each * (numbers - own) + passes.muon(gradient, moment, work.computed) * own
    rate, name = product_rate(hardware, replace(layout, code=replace(layout.code, fp8=None)), model.hidden_size)
    return [
        Part("optimizer", moved / hardware.memory_rate, (), ("memory.share",)),
        Part("Newton-Schulz steps", newton_schulz_flop(model, share) / shards / rate, (), (name,)),
    ]


COMPUTE: tuple[Parts, ...] = (attention, experts, products, elementwise, sorting, host_waits, head, optimizer)
