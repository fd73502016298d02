"""A stage: one chunk of consecutive layers, with the embedding before the first and the heads after the last chunk.

All chunks compute by the steps of `Transformer`. Between them travel the hidden state and, where MTP modules need it,
the embedding, so that one rank alone owns it. The last chunk returns the finished loss; balance losses add their
gradients where they arise. What a step counts stays on the stage, in its `Record`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv3_lightning.model.attention_kernels import Documents, find_documents
from dsv3_lightning.model.moe import RouterStats
from dsv3_lightning.model.scores import most_likely
from dsv3_lightning.model.transformer import MTP_KINDS, Transformer, stack_stats


class Chunk(NamedTuple):
    """A chunk's number, of how many, and its layers of the main model."""

    number: int
    chunks: int
    layers: range

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.chunks - 1


class Weights(NamedTuple):
    """How a micro-batch's losses add up to its part of the step's loss.

    heads: from the summed token losses of each head, fp32 [P]. balance: from the balance terms by name, each of some
        MoE layers, and these layers' rows among all MoE layers; a tensor, or 0.0 without any.
    """

    heads: Callable[[Tensor], Tensor]
    balance: Callable[[dict[str, Tensor], Sequence[int]], Tensor | float]


@dataclass
class Record:
    """What a stage has counted in the micro-batches of a step.

    weights: None where no gradient is wanted. heads: whether the losses of the heads are. draft: as in `Losses`.
    nll_P: fp64. balance, counts_LE: sums as in `Losses`, of this stage's MoE layers only. drafts: of each micro-batch.
    """

    weights: Weights | None = None
    heads: bool = True
    draft: bool = False
    nll_P: Tensor | None = None
    balance: dict[str, Tensor] = field(default_factory=dict)
    counts_LE: Tensor | None = None
    drafts: list[Tensor] = field(default_factory=list)

    def add(self, balance: dict[str, Tensor], counts_LE: Tensor) -> None:
        self.counts_LE = counts_LE if self.counts_LE is None else self.counts_LE + counts_LE
        self.balance = {
            name: term.detach() + self.balance[name] if name in self.balance else term.detach()
            for name, term in balance.items()
        }


class Start(NamedTuple):
    """What a stage's layers take: h [B, T, D], the mask, the documents; and the embedding of all positions [B, S, D],
    or h where MTP modules don't need it."""

    h_BTD: Tensor
    embedding: Tensor
    mask_BT: Tensor
    documents: Documents | None


class Stage(Transformer):
    """One chunk of a model, whose modules it shares. A rank has several, each a root of its own to FSDP.

    rows: of its MoE layers among all of the model. autocast: makes the context that the forward pass runs in; the
    backward pass must not, or what the model computes in fp32 would get gradients in bf16.
    """

    def __init__(self, model: Transformer, chunk: Chunk, autocast: Callable[[], AbstractContextManager] = nullcontext):
        nn.Module.__init__(self)  # its modules are the model's
        self.config, self.recompute = model.config, model.recompute
        self.chunk, self.autocast, self.record = chunk, autocast, Record()
        self.layers = nn.ModuleList([model.get_submodule(f"layers.{number}") for number in chunk.layers])
        self.mtp = model.mtp if chunk.is_last else nn.ModuleList()
        if chunk.is_first:
            self.embed_tokens = model.embed_tokens
        if chunk.is_last:
            self.norm, self.lm_head = model.norm, model.lm_head
        dense, layers = model.config.first_k_dense_replace, model.config.num_hidden_layers
        mtp = range(layers, layers + len(self.mtp))
        self.rows = [number - dense for number in [*chunk.layers, *mtp] if number >= dense]

    def forward(  # type: ignore[override]
        self,
        *inputs: Tensor,
        mask: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """What the next stage takes, or of the last stage the micro-batch's part of the loss, a scalar.

        inputs: tokens [B, S] for the first stage, else what the stage before returns. mask: [B, S]. targets: as in
        `Transformer.losses`. documents: [B, S] or None.
        positions: [B], or rows and positions [2, N]; the last stage then returns the logits at these, fp32 [B, V] or
        [N, V], of tokens [B, T] without targets.
        """
        with self.autocast():
            start = self.begin(inputs, mask, targets, documents)
            h_BTD, stats = self.through_layers(start.h_BTD, start.mask_BT, start.documents)
            return self.end(h_BTD, stats, start, mask, targets, positions)

    def begin(
        self, inputs: tuple[Tensor, ...], mask: Tensor, targets: Tensor | None, documents: Tensor | None
    ) -> Start:
        """What the layers take. The arguments of this and of `end` are those of `forward`."""
        T = mask.shape[1] if targets is None else targets.shape[-1]
        documents_BT = None if documents is None else find_documents(documents[:, :T], mask.device)
        if self.chunk.is_first:
            tokens_BS = inputs[0] if targets is None else inputs[0][:, : T + self.config.mtp_depth]
            embedding_BSD = self.embed_tokens(tokens_BS)
            inputs = embedding_BSD[:, :T], embedding_BSD
        return Start(inputs[0], inputs[-1], mask[:, :T], documents_BT)

    def end(
        self, h_BTD: Tensor, stats: list[RouterStats], start: Start, mask: Tensor, targets: Tensor | None,
        positions: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
        """What `forward` returns, from the output and the stats of the layers."""
        if not self.chunk.is_last:
            return h_BTD if targets is None else self.pass_on(h_BTD, start.embedding, stats)
        trunk_BTD = self.norm(h_BTD)
        if positions is not None:
            if positions.dim() == 1:
                positions = torch.stack([torch.arange(len(positions), device=positions.device), positions])
            return self.lm_head(trunk_BTD[positions[0], positions[1]]).float()
        assert targets is not None
        heads, more = self.head_inputs(trunk_BTD, start.embedding, mask, start.documents)
        return self.finish(heads, targets, [*stats, *more])

    def pass_on(self, h_BTD: Tensor, embedding_BSD: Tensor, stats: list[RouterStats]) -> tuple[Tensor, ...]:
        h_BTD = with_gradient_of(h_BTD, self.count(stats))
        # FSDP hangs hooks on what is returned, which then may be neither a leaf nor a view.
        return (h_BTD, embedding_BSD.clone()) if sends_embedding(self) else (h_BTD,)

    def finish(self, heads: list[Tensor], targets_BPT: Tensor, stats: list[RouterStats]) -> Tensor:
        """The micro-batch's part of the loss."""
        record, balance = self.record, self.count(stats)
        if not record.heads:
            return heads[0].new_zeros((), dtype=torch.float32)
        nll_P = self.lm_head.loss(heads, targets_BPT)
        record.nll_P = nll_P.detach().double() + (0.0 if record.nll_P is None else record.nll_P)
        if record.draft:
            record.drafts.append(torch.stack([most_likely(self.lm_head, h, self.config.vocab_size) for h in heads], 1))
        return nll_P.sum() if record.weights is None else record.weights.heads(nll_P) + balance

    def count(self, stats: list[RouterStats]) -> Tensor | float:
        """Notes the stats of this stage's MoE layers; returns their part of the loss."""
        balance, counts_LE = stack_stats(stats, self.config.n_routed_experts, next(self.parameters()).device)
        self.record.add(balance, counts_LE)
        return 0.0 if self.record.weights is None else self.record.weights.balance(balance, self.rows)


def sends_embedding(model: Transformer) -> bool:
    """Whether the last stage's MTP modules need the embeddings of the tokens."""
    config = model.config
    return config.mtp_depth > 0 and MTP_KINDS[config.mtp_kind].sees_tokens_between


class AddGradient(torch.autograd.Function):
    """h unchanged; a scalar loss gets the gradient 1, as if it were part of the loss that h leads to."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return h.clone()  # FSDP's hooks may not be on a view

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def with_gradient_of(h: Tensor, loss: Tensor | float) -> Tensor:
    return AddGradient.apply(h, loss) if isinstance(loss, Tensor) and loss.requires_grad else h


def own_chunks(layers: Sequence[int], placement: Sequence[int]) -> list[Chunk]:
    """The chunks with these numbers. layers: the number of layers of every chunk.

    >>> [chunk.layers for chunk in own_chunks([1, 2, 2, 1], [0, 3])]
    [range(0, 1), range(5, 6)]
    """
    ends = [sum(layers[: number + 1]) for number in range(len(layers))]
    return [Chunk(number, len(layers), range(ends[number] - layers[number], ends[number])) for number in placement]


def keep_chunks(model: Transformer, chunks: Sequence[Chunk]) -> None:
    """Removes from a model on the meta device what belongs to other ranks. What stays has the whole model's names."""
    own = {number for chunk in chunks for number in chunk.layers}
    for number in range(model.config.num_hidden_layers):
        if number not in own:
            delattr(model.layers, str(number))  # `del layers[number]` would number the others anew
    if not any(chunk.is_first for chunk in chunks):
        del model.embed_tokens
    if not any(chunk.is_last for chunk in chunks):
        del model.norm, model.lm_head
        model.mtp = nn.ModuleList()
