"""The routed experts: one grouped matrix product per projection over tokens sorted by expert. No token is dropped."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.cpu import padded_rows, row_multiple
from dsv3_lightning.model.recompute import keep_no_more
from dsv3_lightning.model.weight_grad import grouped_linear


class Experts(nn.Module):
    """E SwiGLU networks with stacked weights: gate_up_proj [E, D, 2F] (gate first) and down_proj [E, F, D].

    row_multiple: see `cpu.row_multiple`; None chooses by device and dtype.
    """

    gate_up_product = down_product = staticmethod(grouped_linear)  # of an instance also those of fp8.py

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * width))
        self.down_proj = nn.Parameter(torch.empty(E, width, D))
        self.num_experts = E
        self.row_multiple: int | None = None

    def forward(self, x_RD: Tensor, offsets_E: Tensor, gates_R: Tensor | None = None) -> Tensor:
        """FFN_expert(x) of every routed token, weighted by gates_R if given: [R, D], in x's dtype (V3 eq. 12).

        x_RD is sorted by expert; the rows of expert e end before row offsets_E[e] (int64). Rows after the last
        expert's are not computed: the result has anything there, or ends before them.
        """
        multiple = row_multiple(x_RD, self.row_multiple)
        if multiple == 1:
            return self.feed_forward(x_RD, offsets_E, gates_R)
        rows_R, offsets_E = padded_rows(offsets_E, multiple)
        padded_RD = x_RD.new_zeros(int(offsets_E[-1]), x_RD.shape[1]).index_copy(0, rows_R, x_RD[: len(rows_R)])
        if gates_R is not None:
            gates_R = gates_R.new_zeros(len(padded_RD)).index_copy(0, rows_R, gates_R[: len(rows_R)])
        return self.feed_forward(padded_RD, offsets_E, gates_R).index_select(0, rows_R)

    def feed_forward(self, x_RD: Tensor, offsets_E: Tensor, gates_R: Tensor | None) -> Tensor:
        gate, up = self.gate_up_product(x_RD, self.gate_up_proj, offsets_E).chunk(2, -1)
        hidden_RF = F.silu(gate) * up
        if gates_R is not None:
            hidden_RF = (hidden_RF * gates_R[:, None]).to(x_RD.dtype)  # fp32; narrower than the output
            keep_no_more()  # no gradient needs what follows
        return self.down_product(hidden_RF, self.down_proj, offsets_E)
