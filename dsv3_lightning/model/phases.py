"""Blocks in phases, so that two can take turns: one computes while the other's tokens travel to their experts and back.

A block is cut where its tokens leave and where they arrive. `TwoBatches` runs the halves of a batch so; which phase
comes when is a table, the same on all ranks, since they must call collectives in the same order. In the backward pass
autograd runs the phases of both halves in the opposite order, with the ways of the gradients between them.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dsv3_lightning.model.attention_kernels import Documents
from dsv3_lightning.model.balance_table import BALANCE_LOSSES
from dsv3_lightning.model.block import Block
from dsv3_lightning.model.moe import MoE, RouterStats, without_padding
from dsv3_lightning.model.recompute import no_checkpointing
from dsv3_lightning.model.rope import CosSin
from dsv3_lightning.model.transformer import Transformer

Recompute = Callable[..., Any]
Outcome = tuple[Tensor, RouterStats | None]
Phase = Literal["dispatch", "leave", "experts", "send back"]
Phases = Generator[Phase, None, Outcome]

# The halves in turns: tokens of half 0 travel during the attention of half 1, those of half 1 during the experts of
# half 0; outputs of half 0 during the experts of half 1, and those of half 1 during the shared experts of both. The
# tokens of half 1 leave before the outputs of half 0, since messages of one group follow each other.
TURNS = (0, 1, 0, 0, 1, 0, 1, 1, 0, 1)


def phases(
    block: Block, recompute: Recompute, x_BTD: Tensor, rope: CosSin, mask_BT: Tensor, documents: Documents | None
) -> Phases:
    """The pass of a block in five phases, of a dense block in one; yields what was done last. The result is that of
    `Block.forward`.

    recompute: as in `recompute.RECOMPUTE`, applied to each phase by itself; what travels is kept.
    """
    moe = block.mlp
    if not isinstance(moe, MoE):
        return recompute(block, x_BTD, rope, mask_BT, documents)
    x_BTD, u_ND, experts_NK, gates_NK, balance = recompute(attend_and_route, block, x_BTD, rope, mask_BT, documents)
    sent = moe.dispatcher.dispatch(u_ND, experts_NK, gates_NK)
    yield "dispatch"
    moe.dispatcher.leave(sent)
    yield "leave"
    y_RD = recompute(moe.experts, *moe.dispatcher.receive(sent))
    yield "experts"
    returning = moe.dispatcher.send_back(y_RD, sent)
    del y_RD
    yield "send back"
    shared_ND = None if moe.shared_experts is None else recompute(moe.shared_experts, u_ND)
    routed_ND = moe.dispatcher.combine(returning)
    out_ND = routed_ND if shared_ND is None else routed_ND + shared_ND
    return x_BTD + out_ND.view_as(x_BTD), RouterStats(sent.counts_E, balance)


def attend_and_route(
    block: Block, x_BTD: Tensor, rope: CosSin, mask_BT: Tensor, documents: Documents | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The residual stream after attention, the MoE layer's input, its experts (-1 on padding) with their gates, and its
    balance losses."""
    assert isinstance(block.mlp, MoE)
    x_BTD = block.attend(x_BTD, rope, documents)
    u_ND = block.post_attention_layernorm(x_BTD).flatten(0, 1)
    routing = block.mlp.gate(u_ND)
    balance = block.mlp.balance_terms(routing, mask_BT)
    return x_BTD, u_ND, without_padding(routing.experts_NK, mask_BT), routing.gates_NK, balance


class Half(NamedTuple):
    """The arguments of a block for some of the sequences."""

    x_BTD: Tensor
    rope: CosSin
    mask_BT: Tensor
    documents: Documents | None


class TwoBatches:
    """The pass of a block over two halves of the sequences, in turns. recompute: see `phases`.

    Without gradients, as in validation, the sequences stay together: ranks may have different numbers of them.
    """

    def __init__(self, block: Block, recompute: Recompute) -> None:
        self.block, self.recompute = block, recompute

    def __call__(
        self, x_BTD: Tensor, rope: CosSin, mask_BT: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        if not torch.is_grad_enabled():
            return Block.forward(self.block, x_BTD, rope, mask_BT, documents)
        halves = in_halves(Half(x_BTD, rope, mask_BT, documents))
        results = take_turns([phases(self.block, self.recompute, *half) for half in halves], TURNS)
        stats = [of_half for _, of_half in results]
        return torch.cat([out for out, _ in results]), joined(stats, [len(half.mask_BT) for half in halves])


class Whole:
    """The pass of a dense block, checkpointed."""

    def __init__(self, block: Block, recompute: Recompute) -> None:
        self.block, self.recompute = block, recompute

    def __call__(self, *inputs: Any) -> Any:
        return self.recompute(Block.forward, self.block, *inputs)


def overlap_halves(model: Transformer) -> None:
    """Lets every MoE block of the model run in two halves. Each phase is checkpointed by itself, as the model was.

    Of MTP modules what comes before the block is kept.
    """
    for block in (module for module in model.modules() if isinstance(module, Block)):
        run = TwoBatches if isinstance(block.mlp, MoE) else Whole
        block.forward = run(block, model.recompute)  # type: ignore[method-assign, assignment]
    model.recompute = no_checkpointing


def in_halves(whole: Half) -> list[Half]:
    """Two halves of the sequences, of which the first has one more of an odd number; a single sequence stays alone."""
    sizes = (len(whole.mask_BT) + 1) // 2, len(whole.mask_BT) // 2
    if sizes[1] == 0:
        return [whole]
    documents = some_documents(whole.documents, slice(sizes[0])), some_documents(whole.documents, slice(sizes[0], None))
    parts = zip(whole.x_BTD.split(sizes), whole.mask_BT.split(sizes), documents, strict=True)
    return [Half(x_BTD, whole.rope, mask_BT, of_half) for x_BTD, mask_BT, of_half in parts]


def some_documents(documents: Documents | None, cut: slice) -> Documents | None:
    """The documents of some consecutive sequences."""
    if documents is None:
        return None
    ends = torch.tensor([0, *map(len, documents.lengths)]).cumsum(0).tolist()
    start, stop, _ = cut.indices(len(documents.lengths))
    cu_seqlens = documents.cu_seqlens[ends[start] : ends[stop] + 1]
    return Documents(documents.lengths[cut], cu_seqlens - cu_seqlens[0], documents.longest)


def joined(stats: Sequence[RouterStats | None], sequences: Sequence[int]) -> RouterStats:
    """The stats of a whole batch from those of its parts, of so many sequences each."""
    parts = [part for part in stats if part is not None]
    balance = {}
    for name in parts[0].balance:
        is_sum = BALANCE_LOSSES[name].whole_batch
        weights = [1.0 if is_sum else number / sum(sequences) for number in sequences]
        terms = [part.balance[name] * weight for part, weight in zip(parts, weights, strict=True)]
        balance[name] = torch.stack(terms).sum(0)
    return RouterStats(torch.stack([part.counts_E for part in parts]).sum(0), balance)


def take_turns(of_halves: Sequence[Phases], turns: Sequence[int]) -> list[Outcome]:
    """Advances the generators in this order, to their ends; returns their results."""
    results: dict[int, Outcome] = {}
    for half in (turn for turn in turns if turn < len(of_halves)):
        try:
            next(of_halves[half])
        except StopIteration as end:
            results[half] = end.value
    return [results[half] for half in range(len(of_halves))]
