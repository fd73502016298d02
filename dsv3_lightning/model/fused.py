"""Element-wise functions that torch.compile joins to one pass over their data, where the process has turned that on.

They are pure and run inside of autograd functions, on tensors of any number of rows, so that one program serves all
token counts, and modules stay as they are: with checkpointing, sharding, expert parallelism and pipelines.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

Examples = Callable[[torch.dtype], list[tuple[Any, ...]]]


class Fused:
    """A function that is computed as written until `compile_all`. examples: inputs of some rows in a run's dtype, one
    for each program that a run needs.

    Also fewer than two rows are computed as written, since torch.compile makes other programs for them.
    """

    all: ClassVar[list["Fused"]] = []

    def __init__(self, function: Callable[..., Any], examples: Examples) -> None:
        self.function, self.examples = function, examples
        self.compiled: Callable[..., Any] | None = None
        self.__doc__, self.__name__ = function.__doc__, function.__name__
        Fused.all.append(self)

    def __call__(self, first: Tensor, *others: Any) -> Any:
        if self.compiled is None or len(first) < 2:
            return self.function(first, *others)
        with torch.autocast(first.device.type, enabled=False):
            return self.compiled(*(x.detach() if isinstance(x, Tensor) else x for x in (first, *others)))


def fused(examples: Examples) -> Callable[[Callable[..., Any]], Fused]:
    return lambda function: Fused(function, examples)


def compile_all(on: bool = True, backend: str = "inductor") -> None:
    """Turns compiled functions on or off in this process. They are compiled, or read from torch's cache, at their first
    call."""
    for each in Fused.all:
        each.compiled = torch.compile(each.function, dynamic=True, backend=backend) if on else None


def warm_up(dtype: torch.dtype) -> None:
    """Calls every function with its examples, in training and in inference mode."""
    for each in Fused.all:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                for example in each.examples(dtype):
                    each(*example)
