"""Every rate, latency and probability that a plan of time uses: the one table of them, with unit and source.

The rest is arithmetic on shapes (parts.py), counted passes over memory (passes.py) and data sheets (hardware.py). This
project has measured none of them on a GPU; `measured` says so, and `dsv3 plan` with it. Sources are papers, public
threads, or estimates, which say what they follow from.
"""

from typing import NamedTuple

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
FA3 = "arXiv 2407.08608, H100, forward and backward speed at heads of 128 and 256 channels, 4,096 positions"


class Coefficient(NamedTuple):
    """A number that is not arithmetic. values: by GPU generation (`sm80`, `sm90`), or for `all`.

    unit: of the values. measured: by this project, on a GPU.
    """

    values: dict[str, float]
    unit: str
    source: str
    measured: bool = False

    def on(self, generation: str) -> float:
        """The value for a GPU generation."""
        return self.values.get(generation, self.values.get("all", 0.0))


def estimate(why: str) -> str:
    return f"estimate: {why}"


def both(sm90: float, sm80: float, factor: float = 1.0) -> dict[str, float]:
    return {"sm90": sm90 * factor, "sm80": sm80 * factor}


def same(value: float) -> dict[str, float]:
    return {"all": value}


FLOPS, LINE, SLOWEST = "FLOP/s", "share of the line rate", "slowest rank over mean"
TUNING = "NCCL, src/graph/tuning.cc"
HALF = estimate("half of flash's; it also executes the masked half of the square")
FLEX = "pytorch.org/blog/flexattention: {} of flash"
DEEPGEMM = "deepseek-ai/DeepGEMM, README of March 2025, H800, {}; weight gradients assumed as fast (DeepGEMM#95)"
WIDER = "times what wider heads lose in the forward pass"
TABLE = {
    # Attention: of the FLOP that the kernel executes, with 192 channels for queries and keys.
    "attention.flash.forward": Coefficient(both(330, 190, TERA), FLOPS,
        f"{FA3}: 368 and 293, halfway; A100: arXiv 2307.08691, 230 at best"),
    "attention.flash.backward": Coefficient(both(250, 150, TERA), FLOPS,
        f"{FA3}: 310 at 128 channels, {WIDER}; A100: arXiv 2307.08691, 196 at best"),
    "attention.cudnn.forward": Coefficient(both(546, 156, TERA), FLOPS,
        f"{FA3}: 609 and 483, halfway; A100: 0.82 of flash, huggingface/transformers#48163"),
    "attention.cudnn.backward": Coefficient(both(447, 123, TERA), FLOPS,
        f"{FA3}: 499 at 128 channels, {WIDER}; A100: 0.82 of flash, huggingface/transformers#48163"),
    "attention.flex.forward": Coefficient(both(297, 171, TERA), FLOPS, FLEX.format(0.9)),
    "attention.flex.backward": Coefficient(both(212, 128, TERA), FLOPS, FLEX.format(0.85)),
    "attention.efficient.forward": Coefficient(both(165, 95, TERA), FLOPS, HALF),
    "attention.efficient.backward": Coefficient(both(125, 75, TERA), FLOPS, HALF),
    # Matrix products in bf16, and of the routers in fp32.
    "products.narrow": Coefficient(both(520, 200, TERA), FLOPS,
        estimate("widths of about 2,048; wide products reach 716 on H100, vllm-project/vllm#23280")),
    "products.wide": Coefficient(both(620, 230, TERA), FLOPS,
        estimate("widths from 4,096 on; 716 in vllm-project/vllm#23280, less for power limits and odd shapes")),
    "products.grouped": Coefficient(both(480, 150, TERA), FLOPS,
        estimate("grouped_mm on H100 reaches 525 at widths from 5,120, pytorch/ao#2490, less for narrower experts "
                 "and weight gradients; sm80 has a loop of products")),
    "products.wide.fp8": Coefficient({"sm90": 1118 * TERA}, FLOPS, DEEPGEMM.format(
        "4,096 rows: 1,058, 990, 590 and 1,358 for an attention's projections, over V3's FLOP in them")),
    "products.narrow.fp8": Coefficient({"sm90": 938 * TERA}, FLOPS,
        estimate("what wide products gain, 1118 over 620")),
    "products.grouped.fp8": Coefficient({"sm90": 1216 * TERA}, FLOPS, DEEPGEMM.format(
        "8 groups of 4,096 rows: 1,288 for gate and up, 1,093 for down")),
    "products.fp32": Coefficient(same(0.7), "share of the fp32 peak", estimate("cuBLAS SGEMM without TF32")),
    # Memory.
    "memory.share": Coefficient(same(0.8), "share of the bandwidth", estimate("kernels that stream large tensors")),
    "sort.keys": Coefficient(both(4, 2.5, GIGA), "int64 keys/s", estimate("radix sort with its indices")),
    # Wires: NVLink within nodes, one NIC per GPU between them.
    "ring.inside": Coefficient(same(0.82), LINE, "NVIDIA/nccl-tests#212: 370 of 450 GB/s, for the protocol"),
    "ring.between": Coefficient(same(0.9), LINE,
        "NVIDIA/nccl#1229: reduce-scatter at 360 GB/s of 8 times 50 on 4 nodes of H100; more nodes add latency"),
    "exchange.inside": Coefficient(same(0.71), LINE, estimate("NCCL's all-to-all; its rings reach 0.82")),
    "exchange.between": Coefficient(same(0.85), LINE,
        estimate("48.5 of 50 GB/s at best, NVIDIA/nccl-tests#267, less with many peers")),
    "exchange.fused.inside": Coefficient(same(0.78), LINE, "DeepEP, docs/legacy.md: 153 and 158 GB/s on H800, of 200"),
    "exchange.fused.between": Coefficient(same(1.0), LINE, "DeepEP, docs/legacy.md: 51 and 50 GB/s at EP 64, of 50"),
    "overlap.kept": Coefficient(same(112 / 132), "share of computing's speed",
        "arXiv 2412.19437 §3.2.2: 20 of 132 SMs exchange tokens meanwhile"),
    "hop.inside": Coefficient(same(3.4 * MICRO), "s", f"{TUNING}: ring, Simple, NVLink"),
    "hop.between": Coefficient(same(14 * MICRO), "s", f"{TUNING}: ring, Simple, NET"),
    "collective.start": Coefficient(same(8.4 * MICRO), "s", f"{TUNING}: base latency, Simple"),
    "exchange.peer": Coefficient(same(0.5 * MICRO), "s", estimate("per rank of an all-to-all; messages overlap")),
    # Host.
    "host.sync": Coefficient(same(40 * MICRO), "s",
        estimate("19 to 58 us per count, unslothai/unsloth-zoo#1248, and the idle time until the next kernel")),
    "host.pcie": Coefficient(same(0.8), LINE, estimate("pinned copies")),
    # Loads of ranks: each layer waits for its slowest.
    "imbalance.bias": Coefficient(same(1.15), SLOWEST, estimate("experts balanced by their bias")),
    "imbalance.loss": Coefficient(same(1.25), SLOWEST, estimate("balanced by a loss alone, or in the first 100 steps")),
    # A day.
    "disk.write": Coefficient(same(2 * GIGA), "bytes/s and node", estimate("one client of a parallel file system")),
    "disk.total": Coefficient(same(100 * GIGA), "bytes/s", estimate("a parallel file system, all clients together")),
    "save.pause": Coefficient(same(10 * GIGA), "bytes/s and rank", estimate("copy into the host's pinned memory")),
    "failures": Coefficient(same(419 / (54 * 16384)), "per GPU and day",
        "arXiv 2407.21783 §3.3.4: 419 in 54 days on 16,384 H100"),
    "restart": Coefficient(same(600), "s", estimate("notice, reschedule, import, connect and read a checkpoint")),
}  # fmt: skip


def coefficient(name: str, generation: str) -> float:
    """The value of a coefficient on GPUs of a generation, in its unit."""
    return TABLE[name].on(generation)


def unmeasured(names: list[str]) -> list[str]:
    """Those of the coefficients that this project hasn't measured on a GPU."""
    return [name for name in names if not TABLE[name].measured]
