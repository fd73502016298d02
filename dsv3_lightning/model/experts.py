"""The routed experts: tokens sorted by expert, one grouped matrix product per projection. No token is ever dropped."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.config import ModelConfig


class Experts(nn.Module):
    """E SwiGLU networks with stacked weights: gate_up_proj [E, D, 2F] (gate first) and down_proj [E, F, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(E, width, D))

    def forward(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Tensor:
        """Σ_k gate · FFN_expert(x) for every token: [N, D] (V3 eq. 12, the routed part)."""
        order = experts_NK.flatten().argsort(stable=True)  # slot n·K + k -> place among the sorted
        ends_E = torch.bincount(experts_NK.flatten(), minlength=self.down_proj.shape[0]).cumsum(0)
        x_SD = Dispatch.apply(x_ND, order, experts_NK.shape[1])
        y_SD = self.sorted_forward(x_SD, ends_E)
        y_NKD = Combine.apply(y_SD, order).unflatten(0, experts_NK.shape)
        return (gates_NK[:, None].to(y_NKD.dtype) @ y_NKD).squeeze(1)

    def sorted_forward(self, x_SD: Tensor, ends_E: Tensor) -> Tensor:
        """x_SD: S slots sorted by expert; expert e owns the slots up to ends_E[e]."""
        gate, up = grouped_linear(x_SD, self.gate_up_proj, ends_E).chunk(2, -1)
        return grouped_linear(F.silu(gate) * up, self.down_proj, ends_E)


def grouped_linear(x_SD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Row s of x times the matrix of its expert: [S, F]. Takes part in autocast, which knows no grouped product."""
    if torch.is_autocast_enabled(x_SD.device.type):
        dtype = torch.get_autocast_dtype(x_SD.device.type)
        x_SD, weight_EDF = x_SD.to(dtype), weight_EDF.to(dtype)
    return F.grouped_mm(x_SD, weight_EDF, offs=ends_E.int())


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
