"""GPU specifications from data sheets, and the links of a cluster of them. Unknown GPUs are refused."""

from dataclasses import dataclass

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.planning.coefficients import coefficient


@dataclass(frozen=True)
class GPU:
    """Specification of a GPU. peak: dense bf16 FLOP/s. peak_fp32: FLOP/s without TF32, torch's default. memory: bytes.

    inside, between: line rates in bytes/s per GPU and direction, within and between nodes. hbm: bytes/s of its memory.
    host: bytes/s per GPU and direction to host memory (PCIe 5; PCIe 4 for the A100). A node has `per_node` GPUs.
    generation: the key of its values in `coefficients.TABLE`; None if no rate of it is known.
    """

    peak: float
    peak_fp32: float
    memory: float
    inside: float
    between: float
    hbm: float = 3.35e12
    host: float = 64e9
    per_node: int = 8
    generation: str | None = "sm90"

    def peak_in(self, precision: str) -> float:
        """Peak FLOP/s of matrix products for a trainer.precision."""
        return self.peak_fp32 if precision == "32" else self.peak


GPUS = {
    "a100": GPU(312e12, 19.5e12, 80e9, 300e9, 25e9, hbm=2.04e12, host=32e9, generation="sm80"),
    "h100": GPU(989e12, 67e12, 80e9, 450e9, 50e9),
    "h200": GPU(989e12, 67e12, 141e9, 450e9, 50e9, hbm=4.8e12),
    "h800": GPU(989e12, 67e12, 80e9, 200e9, 50e9),  # V3 §3.2.2 says 160 GB/s within a node: what is reached of the 200
    "b200": GPU(2250e12, 75e12, 180e9, 900e9, 50e9, hbm=8e12, generation=None),
}
PLANNED = [name for name, gpu in GPUS.items() if gpu.generation]


def gpu_named(name: str) -> GPU:
    """The GPU of that name. Raises ConfigError for an unknown one, and for one that can't be planned."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu {name}: not known; must be {', '.join(PLANNED)}")
    if gpu.generation is None:
        raise ConfigError(
            f"--gpu {name}: its rates are not known, and its grouped products give experts without tokens a gradient "
            f"(pytorch#172439); must be {', '.join(PLANNED)}"
        )
    return gpu


# The names by which CUDA knows a GPU, without a leading "NVIDIA ". PCIe and NVL cards of a kind have other peaks, and a
# MIG slice has a suffix; both are left out, like everything else whose data sheet isn't above.
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


@dataclass(frozen=True)
class Hardware:
    """GPUs and their links. inside, between: measured bytes/s into a GPU, within and between nodes; None
    takes the line rate times the share of it that is usually reached."""

    gpu: GPU
    inside: float | None = None
    between: float | None = None

    @property
    def generation(self) -> str:
        return self.gpu.generation or "sm90"

    def rate(self, name: str) -> float:
        """A coefficient on these GPUs."""
        return coefficient(name, self.generation)

    @property
    def memory_rate(self) -> float:
        """Bytes/s that a kernel reads or writes."""
        return self.gpu.hbm * self.rate("memory.share")

    def link(self, where: str, kind: str) -> float:
        """Bytes/s into a GPU. where: `inside` or `between` nodes. kind: `ring`, `exchange` or `exchange.fused`."""
        measured, line = getattr(self, where), getattr(self.gpu, where)
        return measured if measured is not None else line * self.rate(f"{kind}.{where}")

    def ring_rate(self, ranks: int, neighbors: int) -> float:
        """Bytes/s that each rank of a ring receives. neighbors: how many ranks of a node are in it, each with a NIC.

        NCCL lays a ring over every NIC of a node, so that the rates of these NICs add up.
        """
        if ranks <= neighbors:
            return self.link("inside", "ring")
        return min(self.link("inside", "ring"), neighbors * self.link("between", "ring"))

    def ring_latency(self, ranks: int, neighbors: int) -> float:
        """Seconds until the last piece has passed all ranks of a ring."""
        if ranks <= 1:
            return 0.0
        nodes = -(-ranks // neighbors)
        crossing = min(nodes, ranks - 1) if nodes > 1 else 0
        hops = (ranks - 1 - crossing) * self.rate("hop.inside") + crossing * self.rate("hop.between")
        return self.rate("collective.start") + hops
