"""SwiGLU with a weight for each row, forward and backward as one pass over the data each (arXiv 2002.05202)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_lightning.model.fused import fused


class WeightedSwiGLU(torch.autograd.Function):
    """silu(gate) · up · weight for gate_up [R, 2F], gate first, and fp32 weights [R]: [R, F] in gate_up's dtype."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights_R: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights_R)
        return weighted_swiglu(gate_up, weights_R)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
        return weighted_swiglu_backward(grad_RF, *ctx.saved_tensors)


@fused(lambda dtype: [(torch.ones(48, 32, dtype=dtype), torch.ones(48))])
def weighted_swiglu(gate_up: Tensor, weights_R: Tensor) -> Tensor:
    gate_RF, up_RF = gate_up.chunk(2, -1)
    return (F.silu(gate_RF) * up_RF * weights_R[:, None]).to(gate_up.dtype)


@fused(lambda dtype: [(torch.ones(48, 16, dtype=dtype), torch.ones(48, 32, dtype=dtype), torch.ones(48))])
def weighted_swiglu_backward(grad_RF: Tensor, gate_up: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate_up and of the weights."""
    gate_RF, up_RF = gate_up.chunk(2, -1)
    silu_RF = F.silu(gate_RF)
    grad_weights_R = (grad_RF * (silu_RF * up_RF)).sum(-1, dtype=weights_R.dtype)
    grad_RF = (grad_RF * weights_R[:, None]).to(grad_RF.dtype)
    grad_gate_RF = torch.ops.aten.silu_backward(grad_RF * up_RF, gate_RF)
    return torch.cat((grad_gate_RF, grad_RF * silu_RF), -1), grad_weights_R
