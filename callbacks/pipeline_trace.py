"""What each rank of a pipeline does in some of a run's steps, for `dsv3 trace`, and the bubble in them."""

import shutil
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.settings import PipelineTraceSettings
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.data_ranks import has_first_samples, pipeline_of
from dsv3_lightning.planning.pipeline.actions import Action
from dsv3_lightning.planning.pipeline.measured import FOLDER, write_trace
from dsv3_lightning.planning.pipeline.timeline import Event
from dsv3_lightning.training.clock import Clock
from dsv3_lightning.training.logging import log_scalars

PASSES = "FIWB"


class PipelineTrace(Callback):
    """Records when each rank of the pipeline starts and ends each of its passes, in every `every_n_steps`-th step.

    Writes pipeline/rank-<r>.jsonl into `default_root_dir`, a line per recorded step, the latest `keep` of them, for the
    first data-parallel rank of each stage. Logs pipeline/bubble_share at these steps: the share of the time of all
    ranks of a pipeline, from the first pass to the end of the last one, in which they make no pass.

    A recorded step starts with a collective, from which each rank counts, so that clocks agree to within its latency;
    CPU ranks of a node share a clock. On CUDA times are those of the current stream, and the host waits for it after
    the step.
    """

    def __init__(self, every_n_steps: int = 50, keep: int = 5) -> None:
        PipelineTraceSettings(every_n_steps=every_n_steps, keep=keep)
        self.every_n_steps = every_n_steps
        self.steps: deque[tuple[int, list[Event]]] = deque(maxlen=keep)
        self.recorder: Recorder | None = None  # during a recorded step

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> Charts:
        return {("is it fast", "share of a step in which ranks of the pipeline wait"): ["pipeline/bubble_share"]}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pipeline_of(trainer.strategy) is None:
            raise ConfigError(
                "PipelineTrace needs a pipeline; set strategy.pipeline_parallel, or pipeline_trace to null"
            )
        if trainer.is_global_zero:  # another run of the folder may have had more ranks
            shutil.rmtree(Path(trainer.default_root_dir) / FOLDER, ignore_errors=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        pipeline = pipeline_of(trainer.strategy)
        if pipeline is None or (trainer.global_step + 1) % self.every_n_steps:
            return
        self.recorder = Recorder(pl_module.device, pipeline.group)
        pipeline.watch = self.recorder.watch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        pipeline = pipeline_of(trainer.strategy)
        if self.recorder is None or pipeline is None:
            return
        events = self.recorder.events()
        self.recorder = pipeline.watch = None
        share = bubble_share(events, pipeline.group, pl_module.device)
        log_scalars(trainer, {"pipeline/bubble_share": share}, trainer.global_step)
        self.steps.append((trainer.global_step, events))
        if has_first_samples(trainer.strategy):
            write_trace(Path(trainer.default_root_dir), dist.get_rank(pipeline.group), dict(self.steps))


class Recorder:
    """Start and end of passes on a device, from the moment that the ranks of a group make it. watch: see
    `runner.Watch`."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        self.clock = Clock(device)
        self.passes: list[tuple[Action, Any, Any]] = []
        if self.clock.cuda:
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            self.zero = self.clock.now()
        else:
            self.zero = zero_of_node(group)

    @contextmanager
    def watch(self, action: str, stage: int, micro_batch: int | None) -> Iterator[None]:
        start = self.clock.now()
        yield
        if action in PASSES and micro_batch is not None:
            self.passes.append((Action(action, stage, micro_batch), start, self.clock.now()))

    def events(self) -> list[Event]:
        """What was recorded, in seconds. Waits for a GPU."""
        self.clock.wait()
        return joined([Event((action,), self.since(start), self.since(end)) for action, start, end in self.passes])

    def since(self, moment: Any) -> float:
        return self.clock.seconds(self.zero, moment)


def zero_of_node(group: dist.ProcessGroup) -> float:
    """The moment on this node's clock at which the first of its ranks in the group calls this, as all must."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (socket.gethostname(), time.perf_counter()), group=group)
    zero: float = next(moment for host, moment in found if host == socket.gethostname())
    return zero


def joined(events: list[Event]) -> list[Event]:
    """The events in the order of their starts; those that overlap become one slot, as passes that run together.

    >>> F, B, W = Action("F", 0, 1), Action("B", 1, 0), Action("W", 1, 0)
    >>> found = joined([Event((B,), 1, 4), Event((F,), 0, 3), Event((W,), 4, 5)])
    >>> [(len(slot), start, end) for slot, start, end in found]
    [(2, 0, 4), (1, 4, 5)]
    """
    found: list[Event] = []
    for event in sorted(events, key=lambda event: event.start):
        if found and event.start < found[-1].end:
            before = found.pop()
            event = Event((*before.slot, *event.slot), before.start, max(before.end, event.end))
        found.append(event)
    return found


def bubble_share(events: list[Event], group: dist.ProcessGroup, device: torch.device) -> float:
    """The share of idle time of all ranks of the group, which all must call it."""
    busy = sum(end - start for _, start, end in events)
    own = torch.tensor([events[0].start, -events[-1].end, busy], dtype=torch.float64, device=device)
    dist.all_reduce(first_and_last := own[:2].clone(), op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(total := own[2].clone(), group=group)
    start, end = first_and_last.tolist()
    return 1.0 - float(total) / ((-end - start) * dist.get_world_size(group))
