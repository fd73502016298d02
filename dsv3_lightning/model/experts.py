"""The routed experts: one grouped matrix product per projection over tokens sorted by expert. No token is dropped."""

import torch
from torch import Tensor, nn

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.cpu import padded_rows, row_multiple
from dsv3_lightning.model.recompute import keep_no_more
from dsv3_lightning.model.swiglu import WeightedSwiGLU
from dsv3_lightning.model.weight_grad import grouped_linear


class Experts(nn.Module):
    """E SwiGLU networks with stacked weights: gate_up_proj [E, D, 2F] (gate first) and down_proj [E, F, D]."""

    gate_up_product = down_product = staticmethod(grouped_linear)  # of an instance also those of fp8.py

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(E, width, D))
        self.num_experts = E

    def forward(self, x_RD: Tensor, offsets_E: Tensor, gates_R: Tensor | None = None) -> Tensor:
        """FFN_expert(x) of every routed token, weighted by gates_R if given: [R, D], in x's dtype (V3 eq. 12).

        x_RD is sorted by expert; the rows of expert e end before row offsets_E[e] (int64). Rows after the last
        expert's are not computed: the result has anything there, or ends before them.
        """
        if gates_R is None:
            gates_R = torch.ones(len(x_RD), device=x_RD.device)
        multiple = row_multiple(x_RD)
        if multiple == 1 or not (offsets_E % multiple).any():
            return self.feed_forward(x_RD, offsets_E, gates_R)
        rows_R, offsets_E = padded_rows(offsets_E, multiple)
        padded_RD = x_RD.new_zeros(int(offsets_E[-1]), x_RD.shape[1]).index_copy(0, rows_R, x_RD[: len(rows_R)])
        gates_R = gates_R.new_zeros(len(padded_RD)).index_copy(0, rows_R, gates_R[: len(rows_R)])
        return self.feed_forward(padded_RD, offsets_E, gates_R).index_select(0, rows_R)

    def feed_forward(self, x_RD: Tensor, offsets_E: Tensor, gates_R: Tensor) -> Tensor:
        gate_up = self.gate_up_product(x_RD, self.gate_up_proj, offsets_E)
        hidden_RF = WeightedSwiGLU.apply(gate_up, gates_R)  # narrower than the output
        keep_no_more()  # no gradient needs what follows
        return self.down_product(hidden_RF, self.down_proj, offsets_E)
