"""Evaluation on tasks while a model trains: curves by task, and every answer in the run's folder."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from dsv3_lightning.callbacks.charts import Charts
from dsv3_lightning.callbacks.protocol import require_data, require_model
from dsv3_lightning.callbacks.settings import EvaluateSettings
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.evaluation.evaluate import Result, evaluate, write_answers
from dsv3_lightning.evaluation.tasks import read_tasks
from dsv3_lightning.evaluation.writers import cached_writer, called_writer
from dsv3_lightning.inference.scoring import score
from dsv3_lightning.parallel.data_ranks import pipeline_of
from dsv3_lightning.parallel.pipeline.relay import Relay
from dsv3_lightning.training.logging import is_due, log_scalars

QUESTION = "is it learning"
CURVES = re.compile(r"gold_bits_per_byte|accuracy_.*|(pass|majority)@\d+|wrong|unreadable|never_ended")
SHOWN = ("gold_bits_per_byte", "accuracy_per_byte", "pass@1")  # in the line on the terminal


class Evaluate(Callback):
    """Scores the model on `tasks` every `every_n_steps` and after the last step, with the same examples each time.

    tasks: jsonl files. limit: the first questions of each task; None: all. Every rank does the same work, so that
    sharded models can compute; random numbers are the evaluation's own, so training is unaffected.
    Logs eval/<task>/<metric>, and writes all answers to evaluation/step=<step>/<task>.jsonl in the run's folder.
    Needs `pl_module.model` (a Transformer) and `trainer.datamodule.tokenizer`.
    """

    def __init__(self, *, tasks: Sequence[str], every_n_steps: int = 1000, limit: int | None = 100) -> None:
        EvaluateSettings(tasks=tasks, every_n_steps=every_n_steps, limit=limit)
        self.every_n_steps, self.limit = every_n_steps, limit
        self.tasks = read_tasks([user_path(path) for path in tasks])

    @staticmethod
    def charts(tree: dict[str, Any], origins: int) -> Charts:
        return {
            (QUESTION, "bits per byte of the right answer, by task"): ["eval/.*/gold_bits_per_byte"],
            (QUESTION, "share of right answers, by task"): ["eval/.*/accuracy_.*", "eval/.*/(pass|majority)@.*"],
            (QUESTION, "generated answers that are wrong, unreadable or never end, by task"): [
                "eval/.*/(wrong|unreadable|never_ended)"
            ],
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_model(pl_module, self)
        require_data(trainer, self, "tokenizer")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not is_due(trainer, batch_idx, self.every_n_steps):
            return
        step, was_training = trainer.global_step, pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            results = [self.evaluate(trainer, pl_module, task) for task in self.tasks]
        pl_module.train(was_training)
        for result in results:
            values = {f"eval/{result.task.name}/{name}": value for name, value in known_values(result).items()}
            log_scalars(trainer, trainer.strategy.broadcast(values))  # the first rank's, for whoever decides by them
            if trainer.is_global_zero:
                print(f"evaluation after step {step}:  {result.task.name}  {line(result)}", flush=True)
                write_answers(Path(trainer.default_root_dir) / "evaluation" / f"step={step}", result)

    def evaluate(self, trainer: Trainer, pl_module: Any, task: Any) -> Result:
        tokenizer, model = trainer.datamodule.tokenizer, pl_module.model  # type: ignore[attr-defined]
        context = model.config.max_position_embeddings
        if isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            writer = cached_writer(model, tokenizer, seed=1)
        else:
            pipeline = pipeline_of(trainer.strategy)
            model = model if pipeline is None else Relay(pipeline)
            writer = called_writer(Agreed(model), tokenizer, seed=1)
        return evaluate(task, tokenizer, functools.partial(score, model), writer, context, limit=self.limit)


class Agreed:
    """A model whose logits are the first rank's on all ranks, so that all draw the same token and end together."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def parameters(self) -> Iterator[nn.Parameter]:
        found: Iterator[nn.Parameter] = self.model.parameters()
        return found

    def __call__(self, tokens_BT: Tensor, positions_B: Tensor) -> Tensor:
        logits_BV: Tensor = self.model(tokens_BT, positions_B).float().contiguous()
        if dist.is_initialized():
            dist.broadcast(logits_BV, src=0)
        return logits_BV


def known_values(result: Result) -> dict[str, float]:
    """The metrics with a curve that are numbers."""
    return {
        name: one.value for name, one in result.metrics.items() if CURVES.fullmatch(name) and one.value == one.value
    }


def line(result: Result) -> str:
    values = known_values(result)
    shown = [f"{name.replace('_', ' ')} {values[name]:.3f}" for name in SHOWN if name in values]
    return "  ".join(shown)
