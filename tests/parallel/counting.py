"""Counts what a pass costs a GPU's queue: collectives, and the moments at which the host waits for the device."""

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.recompute import RECOMPUTE

WAITS = {  # operations for which the host waits on CUDA, and how often
    "aten._local_scalar_dense": 1,
    "aten.nonzero": 1,
    "aten.masked_select": 1,
    "aten._unique2": 1,
    "aten.bincount": 2,  # for the smallest and for the largest value
}
COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class Costs(TorchDispatchMode):
    """`collectives`, by name, and `waits`, by cause, of what runs inside.

    Numbers that are read with `tolist` are a wait, too; torch shows them to no mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> "Costs":
        tolist, costs = Tensor.tolist, self

        def counted(tensor: Tensor) -> Any:
            costs.waits["tolist"] += 1
            return tolist(tensor)

        self.patch = patch.object(Tensor, "tolist", counted)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.namespace, func.overloadpacket.__name__
        if namespace in COLLECTIVES and name not in ("wait_tensor", "barrier"):
            self.collectives["all_to_all" if "to_all" in name or "toall" in name else name] += 1
        times = WAITS.get(f"{namespace}.{name}", 0)
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            times = 1
        if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            times = 1
        if times:
            self.waits[name] += times
        return func(*args, **(kwargs or {}))


def check_costs(part: MoE, costs: dict[str, tuple[tuple[int, int], tuple[int, int]]]) -> None:
    """All-to-alls and waits of the host for the device, in a block's place: with what is computed again.

    costs: by checkpointing policy, those of the forward and of the backward pass.
    """
    x_BTD, mask_BT = torch.randn(2, 9, 16, requires_grad=True), torch.arange(9) < torch.tensor([[9], [4]])
    for policy, expected in costs.items():
        with Costs() as forward:
            out_BTD, stats = RECOMPUTE[policy](part, x_BTD, mask_BT)
        with Costs() as backward:
            (out_BTD.square().sum() + stats.balance["sequence"]).backward()
        found = tuple((passed.collectives["all_to_all"], passed.waits.total()) for passed in (forward, backward))
        assert found == expected, (policy, found, forward.waits, backward.waits)
        assert forward.collectives.keys() | backward.collectives.keys() <= {"all_to_all", "_wrap_tensor_autograd"}
