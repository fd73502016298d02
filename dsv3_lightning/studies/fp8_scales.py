"""One scale for a whole matrix instead of one for each tile, to show beside `compute.fp8` what tiles are for.

As a callback, in configs/experiments/fp8.yaml.
"""

from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from dsv3_lightning.model import fp8
from dsv3_lightning.model.fp8 import scales_for


def one_scale(largest: Tensor, power_of_two: bool) -> Tensor:
    """The same scale for all tiles of a matrix: that of its largest number."""
    return scales_for(largest.amax((-2, -1), keepdim=True).expand_as(largest), power_of_two)


class OneScale(Callback):
    """Replaces the scales of FP8 products while a run lasts."""

    def setup(self, *_args: Any, **_kwargs: Any) -> None:
        fp8.scales_for = one_scale

    def teardown(self, *_args: Any, **_kwargs: Any) -> None:
        fp8.scales_for = scales_for
