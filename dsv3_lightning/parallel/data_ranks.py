"""The ranks that have different samples, under any of Lightning's strategies or ours.

They are all ranks but in a pipeline, where each stage has as many: ranks with the same samples and other layers.
"""

from lightning.pytorch.strategies import Strategy
from torch import Tensor

from dsv3_lightning.parallel.pipeline.pipeline import Pipeline
from dsv3_lightning.parallel.strategy import MeshStrategy


def data_ranks(strategy: Strategy) -> int:
    """How many there are."""
    return strategy.data_ranks if isinstance(strategy, MeshStrategy) else getattr(strategy, "world_size", 1)


def has_first_samples(strategy: Strategy) -> bool:
    """Whether this is the first of them, or in a pipeline one with the same samples."""
    return strategy.data_rank == 0 if isinstance(strategy, MeshStrategy) else bool(strategy.is_global_zero)


def sum_over_data(strategy: Strategy, values: Tensor) -> Tensor:
    """The sum of what they have, also in place. Every rank must call it; ranks with the same samples have the same."""
    if isinstance(strategy, MeshStrategy):
        return strategy.sum_over_data(values)
    summed: Tensor = strategy.reduce(values, reduce_op="sum")
    return summed


def pipeline_of(strategy: Strategy) -> Pipeline | None:
    """The strategy's pipeline, if it has one."""
    return strategy.pipeline if isinstance(strategy, MeshStrategy) else None
