"""A rank's part of a pipeline: its stages, a step through all of them, and what all ranks count together."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dsv3_lightning.common.schedules import SCHEDULES
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.balance_table import BALANCE_LOSSES
from dsv3_lightning.model.transformer import Losses, Transformer
from dsv3_lightning.parallel.pipeline.runner import Runner
from dsv3_lightning.parallel.pipeline.stage import Record, Stage, Weights, keep_chunks, own_chunks
from dsv3_lightning.parallel.pipeline.torch_stage import Shape, Watch

INPUTS = ("mask", "targets", "documents")


class Pipeline:
    """The stages of this rank and the schedules for them, one for each number of micro-batches.

    layers: the number of layers in each chunk. placement: the chunks of each rank. dtype: of what stages pass on.
    watch: see `torch_stage.Watch`. overlap, waiting: see `runner.Runner`. watch may be set between steps, the others
    before the first.
    """

    def __init__(
        self, model: Transformer, layers: Sequence[int], placement: Sequence[Sequence[int]], schedule: str,
        mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, autocast: Callable[[], AbstractContextManager],
    ) -> None:  # fmt: skip
        self.group, self.device, self.dtype = mesh.get_group(), device, dtype
        chunks = own_chunks(layers, placement[self.group.rank()])
        owner = {chunk: rank for rank, own in enumerate(placement) for chunk in own}
        self.owners = [owner[chunk] for chunk in range(len(layers))]  # the rank of each chunk
        names = [*model.state_dict()]
        self.order = {name: place for place, name in enumerate(names)}  # of all ranks' parameters and buffers
        if SCHEDULES[schedule].splits:
            refuse_compiled(model, schedule)
        keep_chunks(model, chunks)
        self.model, self.schedule = model, schedule
        self.stages = [Stage(model, chunk, autocast) for chunk in chunks]
        self.runners: dict[tuple[Shape, bool], Runner] = {}
        self.watch: Watch | None = None
        self.overlap: Any = None
        self.waiting: int | None = None

    @property
    def rows(self) -> list[int]:
        """Those of this rank's MoE layers among all of the model."""
        return [row for stage in self.stages for row in stage.rows]

    def gather_rows(self, own: Sequence[Tensor]) -> Tensor:
        """A row [E] of each of this rank's MoE layers, as fp32 [L, E] of all ranks'."""
        config = self.model.config
        rows_LE = torch.zeros(config.num_moe_layers, config.n_routed_experts, device=self.device)
        for row, value in zip(self.rows, own, strict=True):
            rows_LE[row] = value
        dist.all_reduce(rows_LE, group=self.group)
        return rows_LE

    def train(self, batch: dict[str, Tensor], micro_batches: int, weights: Weights) -> Losses:
        """Forward and backward passes of a step; returns the losses of the whole batch of this data-parallel rank."""
        return self.run(batch, micro_batches, True, Record(weights=weights))

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor], micro_batches: int, draft: bool = False) -> Losses:
        """Forward passes alone. draft: as in `Transformer.losses`."""
        return self.run(batch, micro_batches, False, Record(draft=draft))

    @torch.no_grad()
    def count(self, batch: dict[str, Tensor], micro_batches: int) -> Tensor:
        """Tokens per expert, int64 [L, E], by a forward pass through all stages."""
        return self.run(batch, micro_batches, False, Record(heads=False)).counts_LE

    def run(self, batch: dict[str, Tensor], micro_batches: int, trains: bool, wanted: Record) -> Losses:
        """A step through all stages. wanted: a record without counts."""
        samples, positions = len(batch["tokens"]) // micro_batches, batch["targets"].shape[-1]
        shape = Shape(micro_batches, samples, positions)
        if (shape, trains) not in self.runners:
            self.runners[shape, trains] = Runner(
                self.stages,
                shape,
                self.schedule,
                trains,
                self.group,
                self.device,
                self.dtype,
                self.overlap,
                self.waiting,
            )
        for stage in self.stages:
            stage.record = Record(wanted.weights, wanted.heads, wanted.draft)
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        self.runners[shape, trains].run(batch["tokens"], self.watch, **inputs)
        losses = self.summed(micro_batches)
        return losses._replace(drafts_BPT=self.all_drafts(batch["targets"].shape)) if wanted.draft else losses

    def summed(self, micro_batches: int) -> Losses:
        """What all stages have counted, on every rank: by one all-reduce, in fp64, where counts are exact."""
        config, records = self.model.config, [(stage, stage.record) for stage in self.stages]
        layers, experts = config.num_moe_layers, config.n_routed_experts
        names = self.model.balance if layers else ()
        sizes = {name: (layers, experts) if BALANCE_LOSSES[name].whole_batch else (layers,) for name in names}
        shapes = {"nll": (1 + config.mtp_depth,), "counts": (layers, experts), **sizes}
        totals = {name: torch.zeros(size, dtype=torch.float64, device=self.device) for name, size in shapes.items()}
        for stage, record in records:
            if record.nll_P is not None:
                totals["nll"] += record.nll_P
            if record.counts_LE is not None and stage.rows:
                for name, term in {"counts": record.counts_LE, **record.balance}.items():
                    totals[name][stage.rows] += term
        packed = torch.cat([total.flatten() for total in totals.values()])
        dist.all_reduce(packed, group=self.group)
        parts = packed.split([total.numel() for total in totals.values()])
        found = {name: part.view(shapes[name]) for name, part in zip(totals, parts)}
        balance = {name: found[name].float() / (1 if BALANCE_LOSSES[name].whole_batch else micro_batches)
                   for name in names}  # fmt: skip
        return Losses(found["nll"].float(), balance, found["counts"].long())

    def all_drafts(self, size: torch.Size) -> Tensor:
        """The drafts of the last stage [B, P, T], on every rank."""
        own = [torch.cat(stage.record.drafts) for stage in self.stages if stage.record.drafts]
        drafts_BPT = own[0] if own else torch.zeros(size, dtype=torch.int64, device=self.device)
        dist.all_reduce(drafts_BPT, group=self.group)
        return drafts_BPT


def refuse_compiled(model: Transformer, schedule: str) -> None:
    """Raises ConfigError for a compiled module, whose backward pass can't be split."""
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ConfigError(
                f"strategy.schedule={schedule}: splits the backward pass, which torch.compile can't do "
                f"({name or 'the model'} is compiled); use 1f1b or interleaved_1f1b, or leave it uncompiled"
            )
