"""The output head, which all losses share: logits, and the summed losses of tokens with or without weights."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_lightning.model.autocast import compute_dtype
from dsv3_lightning.model.cpu import LossChunks, loss_chunks
from dsv3_lightning.model.fused_loss import log_probabilities
from dsv3_lightning.model.losses import linear_cross_entropy

# From log-probabilities and entropies of the main head's tokens, each [B, T], to the weights of their losses, [B, T].
Weigh = Callable[[Tensor, Tensor], Tensor]


class OutputHead(nn.Linear):
    """h [..., D] -> logits [..., V]. `loss` never holds them all (chunks; None: see `cpu.loss_chunks`).

    temperature: what `loss` divides the main head's logits by where it is given weights.
    """

    chunks: LossChunks | None = None
    temperature = 1.0

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight.to(h.dtype))  # sharded and tied to the embedding, the weight is wider in bf16

    def loss(self, inputs_PBTD: list[Tensor], targets_BPT: Tensor, weigh: Weigh | None = None) -> Tensor:
        """Summed cross-entropy of the targets that are not IGNORE, fp32 [P]. One call for all P heads, so that a
        sharded weight is gathered once.

        weigh: called with the log-probabilities of the main head's targets (0 at IGNORE) and the entropies, fp32
        [B, T], at `temperature`; the main head's loss is then the sum with the weights that it returns. The loss of the
        other heads doesn't change the head's weight then.
        """
        if weigh is None:
            rows = zip(inputs_PBTD, targets_BPT.unbind(1), strict=True)
            losses = [linear_cross_entropy(h.flatten(0, 1), self.weight, t.flatten(), self.chunks) for h, t in rows]
            return torch.stack(losses)
        (main, *others), (wanted, *later) = inputs_PBTD, targets_BPT.unbind(1)
        h_ND, targets_N = main.flatten(0, 1), wanted.flatten()
        if self.temperature != 1:
            h_ND = h_ND / self.temperature  # as good as dividing the logits
        log_p_N, entropy_N = self.log_probabilities(h_ND, targets_N)
        weights_N = weigh(log_p_N.view(wanted.shape), entropy_N.view(wanted.shape)).flatten()
        losses = [linear_cross_entropy(h_ND, self.weight, targets_N, self.chunks, weights_N)]
        for h_BTD, targets_BT in zip(others, later, strict=True):
            flat = h_BTD.flatten(0, 1), self.weight.detach(), targets_BT.flatten()
            losses.append(linear_cross_entropy(*flat, self.chunks))
        return torch.stack(losses)

    @torch.no_grad()
    def log_probabilities(self, h_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """log π of each target and the entropies, fp32 [N] (see `fused_loss.log_probabilities`)."""
        dtype = compute_dtype(h_ND)
        chunks = self.chunks or loss_chunks(h_ND.device.type, self.out_features)
        return log_probabilities(h_ND.to(dtype), self.weight.to(dtype), targets_N, *chunks)
