"""Memory of the ranks of a pipeline.

A stage's parameters are gathered once per step, and its gradients stay whole, in fp32, until its last backward pass
(ZeRO-1 and -2 only between steps). Activations are those of the chunks that are live at the same time.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.activations import widths_of
from dsv3_lightning.planning.cluster import RankMemory, kept_more, last_block, logits_bytes
from dsv3_lightning.planning.layout import Mesh, Work
from dsv3_lightning.planning.matrices import muon_parameters
from dsv3_lightning.planning.pipeline.timeline import Held, Timeline, peak_live
from dsv3_lightning.planning.share import Share, share_parameters, small_parameters, together


class ChunkBytes(NamedTuple):
    """Bytes that a chunk holds of one micro-batch. waiting: between the parts of a split backward pass; all others from
    the forward pass to the backward pass, or its input part."""

    activations: float
    between: float  # what came from other chunks and goes to them
    loss: float  # gradients of the output matrix, which the loss computes in the forward pass
    waiting: float  # inputs of products and gradients of their outputs, for the gradients of the weights

    @property
    def total(self) -> float:
        return self.activations + self.between + self.loss

    def held(self, layers: int, again: float) -> Held:
        """layers: of the chunk. again: bytes that a layer computes again for its backward pass, and then gives up."""
        last = max(self.total, self.waiting * (1 - 1 / layers)) + again
        return Held(self.total, self.total + again, max(last, self.waiting), self.waiting)


def chunk_bytes(model: ModelConfig, work: Work, share: Share, ep: int) -> ChunkBytes:
    """The bytes of a chunk with this share. The input of a chunk counts among its first block's activations.

    ep: ranks that share the experts.
    """
    widths = widths_of(model, work.precision, ep, work.fp8)
    sends = model.mtp_depth > 0 and model.mtp_kind == "sequential"
    hidden = widths.residual * model.hidden_size * work.tokens
    between = (not share.heads) * hidden + sends * hidden
    loss = share.heads * 4 * model.vocab_size * model.hidden_size
    kept = widths.micro_batch(share, work.tokens, work.policy).kept
    return ChunkBytes(kept, between, loss, work.tokens * widths.between_parts(share))


def pipeline_memory(
    model: ModelConfig, mesh: Mesh, work: Work, shares: Sequence[Share], placement: Sequence[Sequence[int]],
    timeline: Timeline,
) -> list[RankMemory]:  # fmt: skip
    """The memory of each rank at the peak of a step. shares: of each chunk. placement: the chunks of each rank."""
    live = [chunk_bytes(model, work, share, mesh.ep) for share in shares]
    widths = widths_of(model, work.precision, mesh.ep, work.fp8)
    found = []
    for chunks, events in zip(placement, timeline.ranks, strict=True):
        own = together(shares[i] for i in chunks)
        again = widths.micro_batch(own, work.tokens, work.policy).made_again
        if own.heads:  # the scaling of a gradient of the output matrix, or a block after these gradients are added
            gradient = 4 * model.vocab_size * model.hidden_size
            again = max(gradient, again - own.heads * gradient)
        parts = [each.held(share.layers, again) for each, share in zip(live, shares, strict=True)]
        held = peak_live(events, parts)
        found.append(stage_memory(model, mesh, work, own, held))
    return found


def stage_memory(model: ModelConfig, mesh: Mesh, work: Work, own: Share, activations: float) -> RankMemory:
    """The memory of a rank that has this share of the model and holds these bytes of activations."""
    dense, routed = share_parameters(model, own)
    small = small_parameters(model, own)
    kept = 4 * (dense + routed) / mesh.dp_shard + kept_more(mesh, small)
    whole = dense + routed / mesh.ep
    block = last_block(model, mesh.ep)
    logits = logits_bytes(model, work) if own.heads else 0
    gathered = work.computed * (whole - small) + 4 * small  # parameters
    gathered += 4 * whole - kept  # gradients, in place of their shards
    gathered += max(work.computed * block, logits)  # gradients of the micro-batch's last block, before they are added
    single = 4 * muon_parameters(model, own) / mesh.dp_shard if work.kind == "muon" else 0
    return RankMemory(kept, kept, (2 * kept - single) * work.moment / 4, gathered, activations, offloaded=False)
