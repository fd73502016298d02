"""What GPUs can do, from their makers' data sheets: nothing here is measured, and no unknown GPU is guessed."""

from dataclasses import dataclass

from dsv3_lightning.errors import ConfigError


@dataclass(frozen=True)
class GPU:
    """peak: dense bf16 FLOP/s; peak_fp32: of real fp32, as torch computes unless it is allowed TF32. memory: bytes.

    inside, between: bytes/s per GPU and direction, within and between nodes.
    host: bytes/s per GPU and direction to the host's memory (PCIe 5, and 4 for the A100). A node has `per_node` GPUs.
    """

    peak: float
    peak_fp32: float
    memory: float
    inside: float
    between: float
    host: float = 64e9
    per_node: int = 8

    def peak_in(self, precision: str) -> float:
        """FLOP/s of the matrix products of a run with this trainer.precision."""
        return self.peak_fp32 if precision == "32" else self.peak


GPUS = {
    "a100": GPU(312e12, 19.5e12, 80e9, 300e9, 25e9, host=32e9),
    "h100": GPU(989e12, 67e12, 80e9, 450e9, 50e9),
    "h200": GPU(989e12, 67e12, 141e9, 450e9, 50e9),
    "h800": GPU(989e12, 67e12, 80e9, 160e9, 50e9),  # bandwidths as V3 §3.2.2 has them
    "b200": GPU(2250e12, 75e12, 180e9, 900e9, 50e9),
}


def gpu_named(name: str) -> GPU:
    """Raises ConfigError."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name}: not known; must be {', '.join(GPUS)}")
    return GPUS[name.lower()]
