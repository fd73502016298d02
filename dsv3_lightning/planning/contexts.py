"""The longest sequence that one rank can hold, and so the longest context: sequences aren't split over ranks."""

from dataclasses import replace

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.cluster import rank_memory
from dsv3_lightning.planning.layout import Mesh, Policy, Work

LONG = (32768, 131072)  # the report's two extensions (V3 §4.3)
UNIT = 1024


def memory_of(model: ModelConfig, shape: Mesh, strategy: Policy, work: Work, length: int) -> float:
    """Bytes of a rank with one sample of this length per micro-batch."""
    return rank_memory(model, shape, strategy, replace(work, tokens=length, sequence_length=length)).total


def longest(model: ModelConfig, shape: Mesh, strategy: Policy, work: Work, memory: float) -> int:
    """The longest sequence, a multiple of 1,024, of which one sample fits into these bytes; 0 if none does."""
    low, high = 0, UNIT
    while memory_of(model, shape, strategy, work, high) <= memory and high < 2**30:
        low, high = high, 2 * high
    while high - low > UNIT:
        middle = (low + high) // 2 // UNIT * UNIT
        low, high = (middle, high) if memory_of(model, shape, strategy, work, middle) <= memory else (low, middle)
    return low
