"""Element-wise functions that torch.compile joins to one pass over their data, where the process has turned that on."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor


class Fused:
    """A pure function of tensors whose first dims may have any size; computed as written until `compile_all`."""

    all: ClassVar[list["Fused"]] = []

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = self.run = function
        self.__doc__, self.__name__ = function.__doc__, function.__name__
        Fused.all.append(self)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.run(*(x.detach() for x in inputs))

    def compile(self) -> None:
        self.run = torch.compile(self.function, dynamic=True)


def fused(function: Callable[..., Any]) -> Fused:
    return Fused(function)
