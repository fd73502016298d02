"""GPU specifications from data sheets, not measurements. Unknown GPUs are refused."""

from dataclasses import dataclass

from dsv3_lightning.errors import ConfigError


@dataclass(frozen=True)
class GPU:
    """Specification of a GPU. peak: dense bf16 FLOP/s. peak_fp32: FLOP/s without TF32, torch's default. memory: bytes.

    inside, between: bytes/s per GPU and direction, within and between nodes.
    host: bytes/s per GPU and direction to host memory (PCIe 5; PCIe 4 for the A100). A node has `per_node` GPUs.
    """

    peak: float
    peak_fp32: float
    memory: float
    inside: float
    between: float
    host: float = 64e9
    per_node: int = 8

    def peak_in(self, precision: str) -> float:
        """Peak FLOP/s of matrix products for a trainer.precision."""
        return self.peak_fp32 if precision == "32" else self.peak


GPUS = {
    "a100": GPU(312e12, 19.5e12, 80e9, 300e9, 25e9, host=32e9),
    "h100": GPU(989e12, 67e12, 80e9, 450e9, 50e9),
    "h200": GPU(989e12, 67e12, 141e9, 450e9, 50e9),
    "h800": GPU(989e12, 67e12, 80e9, 160e9, 50e9),  # bandwidths from V3 §3.2.2
    "b200": GPU(2250e12, 75e12, 180e9, 900e9, 50e9),
}


def gpu_named(name: str) -> GPU:
    """The GPU of that name. Raises ConfigError for an unknown one."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name}: not known; must be {', '.join(GPUS)}")
    return GPUS[name.lower()]


# The names by which CUDA knows a GPU, without a leading "NVIDIA ". PCIe and NVL cards of a kind have other peaks, and a
# MIG slice has a suffix; both are left out, as everything else whose data sheet isn't above.
CUDA_NAMES = {
    "A100-SXM4-40GB": "a100",
    "A100-SXM4-80GB": "a100",
    "A100-PCIE-40GB": "a100",
    "A100-PCIE-80GB": "a100",
    "A100 80GB PCIe": "a100",
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "H800": "h800",
    "B200": "b200",
}


def gpu_of_device(name: str) -> GPU | None:
    """The specification of the GPU that CUDA calls by this name; None for one that is not known.

    >>> gpu_of_device("NVIDIA H100 80GB HBM3").peak, gpu_of_device("NVIDIA H100 PCIe")
    (989000000000000.0, None)
    """
    short = CUDA_NAMES.get(name.removeprefix("NVIDIA ").strip())
    return None if short is None else GPUS[short]
