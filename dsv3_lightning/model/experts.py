"""The routed experts: tokens sorted by expert, one grouped matrix product per projection. No token is ever dropped."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.autocast import computes_in
from dsv3_lightning.model.config import ModelConfig

# oneDNN makes a program for every new shape of a bf16 product, which takes longer than to run it. Numbers of tokens are
# new in every step; of multiples there are few.
ROWS_AT_ONCE = 16


@runtime_checkable
class Dispatcher(Protocol):
    """Brings sorted slots to where their experts are, and what these make of them back. Here by default.

    send: x_SD, slots sorted by expert, and counts_E, int64, on their way; returns what `collect` needs.
    collect: y_SD, after `compute(x_SD, ends_E)` was called for the experts of this process.
    """

    def send(self, x_SD: Tensor, counts_E: Tensor) -> Any: ...

    def collect(self, sent: Any, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor: ...


class Here:
    """Every expert is in this process: nothing travels."""

    def send(self, x_SD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        return x_SD, counts_E.cumsum(0)

    def collect(self, sent: tuple[Tensor, Tensor], compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return compute(*sent)


class Experts(nn.Module):
    """E SwiGLU networks with stacked weights: gate_up_proj [E, D, 2F] (gate first) and down_proj [E, F, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(E, width, D))
        self.num_experts = E
        self.dispatcher: Dispatcher = Here()

    def forward(
        self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, meanwhile: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Σ_k gate · FFN_expert(x) for every token: [N, D] (V3 eq. 12, the routed part).

        meanwhile: computed while the tokens travel to their experts, and added.
        """
        x_ND = x_ND.to(computes_in(x_ND))  # half the bytes travel
        order = experts_NK.flatten().argsort(stable=True)  # slot n·K + k -> place among the sorted
        counts_E = torch.bincount(experts_NK.flatten(), minlength=self.num_experts)
        sent = self.dispatcher.send(Dispatch.apply(x_ND, order, experts_NK.shape[1]), counts_E)
        more_ND = None if meanwhile is None else meanwhile()
        y_SD = self.dispatcher.collect(sent, self.sorted_forward)
        y_NKD = Combine.apply(y_SD, order).unflatten(0, experts_NK.shape)
        y_ND = (gates_NK[:, None].to(y_NKD.dtype) @ y_NKD).squeeze(1)
        return y_ND if more_ND is None else y_ND + more_ND

    def sorted_forward(self, x_SD: Tensor, ends_E: Tensor) -> Tensor:
        """x_SD: S slots sorted by expert; expert e owns the slots up to ends_E[e]."""
        rows_S = None
        if ROWS_AT_ONCE > 1 and x_SD.dtype == torch.bfloat16 and x_SD.device.type == "cpu":
            rows_S, ends_E = padded_rows(ends_E, len(x_SD), ROWS_AT_ONCE)
            x_SD = x_SD.new_zeros(int(ends_E[-1]), x_SD.shape[1]).index_copy(0, rows_S, x_SD)
        gate, up = grouped_linear(x_SD, own(self.gate_up_proj), ends_E).chunk(2, -1)
        y_SD = grouped_linear(F.silu(gate) * up, own(self.down_proj), ends_E)
        return y_SD if rows_S is None else y_SD.index_select(0, rows_S)


def own(weight_EDF: Tensor) -> Tensor:
    """The part of a weight that this process computes with: of a DTensor its local one, else all."""
    return weight_EDF.to_local() if hasattr(weight_EDF, "to_local") else weight_EDF


def grouped_linear(x_SD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Row s of x times the matrix of its expert: [S, F], in x's dtype: autocast knows no grouped product."""
    return F.grouped_mm(x_SD, weight_EDF.to(x_SD.dtype), offs=ends_E.int())


def padded_rows(ends_E: Tensor, slots: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Where each of the sorted slots goes when every expert's part is filled up to a multiple of rows: [S], and the
    parts' new ends, [E].

    >>> padded_rows(torch.tensor([1, 1, 4]), 4, 2)
    (tensor([0, 2, 3, 4]), tensor([2, 2, 6]))
    """
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    padded_E = (counts_E + multiple - 1) // multiple * multiple
    new_ends_E = padded_E.cumsum(0)
    shift_E = new_ends_E - padded_E - (ends_E - counts_E)
    return torch.arange(slots) + shift_E.repeat_interleave(counts_E), new_ends_E


class Dispatch(torch.autograd.Function):
    """Copies token n into the slots n·K … n·K + K-1, in sorted order.

    As an own function since the gradient is a gather and a sum: indexing's own backward would scatter, which is slow on
    CPU and not deterministic on CUDA.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, order: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.K = K
        return x_ND.index_select(0, order // K)  # on CPU much faster than indexing

    @staticmethod
    def backward(ctx, grad_SD: Tensor):
        (order,) = ctx.saved_tensors
        return grad_SD.index_select(0, inverse(order)).unflatten(0, (-1, ctx.K)).sum(1), None, None


class Combine(torch.autograd.Function):
    """Undoes the sorting: slot n·K + k gets what its sorted place holds."""

    @staticmethod
    def forward(ctx, y_SD: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y_SD.index_select(0, inverse(order))

    @staticmethod
    def backward(ctx, grad_SD: Tensor):
        (order,) = ctx.saved_tensors
        return grad_SD.index_select(0, order), None


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order` (int64)."""
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)
