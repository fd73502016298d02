"""The model's logits through a pipeline without a schedule: one chunk computes after the other."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dsv3_lightning.model.scores import Scores
from dsv3_lightning.parallel.pipeline.pipeline import Pipeline


class Relay:
    """Called as a `Transformer` is, by every rank with the same tokens; all get the logits.

    For a few samples of text: the other ranks wait while a chunk computes, and parameters are gathered for each call.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.config = pipeline, pipeline.model.config

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of this rank."""
        return self.pipeline.model.parameters()

    @torch.no_grad()
    def __call__(self, tokens_BT: Tensor, positions_B: Tensor) -> Tensor:
        """Logits at one position of each row, fp32 [B, V]; or at rows and positions [2, N], fp32 [N, V]."""
        group, device = self.pipeline.group, self.pipeline.device
        own = {stage.chunk.number: stage for stage in self.pipeline.stages}
        owners = self.pipeline.owners
        x, mask_BT = tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool)
        for chunk, owner in enumerate(owners):
            before = owners[max(chunk - 1, 0)]
            if owner == group.rank():
                if before != owner:
                    x = torch.empty(*tokens_BT.shape, self.config.hidden_size, dtype=self.pipeline.dtype, device=device)
                    dist.recv(x, group=group, group_src=before)
                x = own[chunk](x, mask=mask_BT, positions=positions_B)
                free(own[chunk])
            following = owners[min(chunk + 1, len(owners) - 1)]
            if owner == group.rank() != following:
                dist.send(x.contiguous(), group=group, group_dst=following)
        if owners[-1] != group.rank():
            x = torch.empty(positions_B.shape[-1], self.config.vocab_size, device=device)
        dist.broadcast(x, group=group, group_src=owners[-1])
        return x

    def token_scores(self, tokens_BT: Tensor, mask_BT: Tensor, places_N: Tensor, wanted_N: Tensor) -> Scores:
        """As `Transformer.token_scores`, with the logits of all places at a time. Padding counts as tokens."""
        T = tokens_BT.shape[1]
        logits_NV = self(tokens_BT, torch.stack([places_N // T, places_N % T]))
        log_p_N = logits_NV.gather(1, wanted_N[:, None]).squeeze(1) - logits_NV.logsumexp(1)
        return Scores(log_p_N, logits_NV.max(1).indices)


def free(stage: nn.Module) -> None:
    """Frees the parameters that FSDP has gathered."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
