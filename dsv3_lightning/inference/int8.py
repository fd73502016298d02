"""Feed-forward networks, experts and the output head with int8 weights, for single.py: a quarter of the bytes to read.

Each row of a matrix has one scale (bf16), so that its largest number becomes 127. Inputs and outputs of these products
are bf16; attention, router, norms, residual sums and the pass over a prompt stay fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.single import Experts, FeedForward
from dsv3_lightning.model.moe import MLP, MoE

WIDTH = 32


class Int8:
    """A weight [outputs, inputs] as int8. x, bf16 [rows, inputs] -> bf16 [rows, outputs].

    torch's product reads 32 numbers at a time, so rows of zeros fill the outputs up. Raises ConfigError for inputs of
    another width.
    """

    def __init__(self, weight: Tensor) -> None:
        self.size, inputs = weight.shape
        if inputs % WIDTH:
            raise ConfigError(
                f"--weights int8: every width must be a multiple of {WIDTH}; the model has one of {inputs}"
            )
        weight = F.pad(weight, (0, 0, 0, -self.size % WIDTH))
        self.scale = (weight.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.weight, self.scale)[:, : self.size]


def int8_feed_forward(mlp: nn.Module) -> "FeedForward | Int8Experts":
    """A block's feed-forward network or experts for single.py, with int8 weights."""
    assert isinstance(mlp, MLP | MoE)
    return Int8Experts(mlp) if isinstance(mlp, MoE) else Int8FeedForward(mlp)


class Int8FeedForward(FeedForward):
    def __init__(self, mlp: MLP) -> None:
        self.gate, self.up, self.down = (Int8(x.weight) for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def __call__(self, x_D: Tensor, h_D: Tensor) -> None:
        h_1D = h_D.bfloat16()[None]
        x_D.add_(self.down(F.silu(self.gate(h_1D)).mul_(self.up(h_1D)))[0])


class Int8Experts(Experts):
    def __init__(self, moe: MoE) -> None:
        super().__init__(moe)
        self.gate_up_int8 = [Int8(weight) for weight in self.gate_up]
        self.down_int8 = [Int8(weight) for weight in self.down]
        self.shared = None if moe.shared_experts is None else Int8FeedForward(moe.shared_experts)

    def products(self, x_D: Tensor, h_D: Tensor, experts: list[int], gates: list[float]) -> None:
        h_1D = h_D.bfloat16()[None]
        gate_KF, up_KF = torch.cat([self.gate_up_int8[expert](h_1D) for expert in experts]).chunk(2, 1)
        inner = F.silu(gate_KF).mul_(up_KF).split(1)
        y_KD = torch.cat([self.down_int8[expert](inner_1F) for expert, inner_1F in zip(experts, inner)]).float()
        x_D.addmv_(y_KD.t(), torch.tensor(gates))
