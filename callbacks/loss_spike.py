"""Spikes of the training loss: a return to an earlier checkpoint, without the samples that led there."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dsv3_lightning.callbacks.checkpoint import checkpoint_folder
from dsv3_lightning.callbacks.protocol import require_data
from dsv3_lightning.callbacks.settings import LossSpikeSettings
from dsv3_lightning.common.json_files import read_json
from dsv3_lightning.errors import RunStopped
from dsv3_lightning.parallel.checkpoints.names import resumable_files, step_in
from dsv3_lightning.training.logging import is_last_micro_batch, is_log_step, latest_scalars

RETURNS = "returns.json"  # in the run's folder: a record per return
LEAST_SPREAD = 0.01  # as a share of the median, so that a nearly constant loss has no tiny spikes


class LossSpiked(RunStopped):
    """The loss has spiked: training should continue after step `back_to`, without the samples of the steps since.

    step: the logged step with the spike. Raised on all ranks; `dsv3 run` catches it and continues.
    """

    def __init__(self, step: int, loss: float, back_to: int) -> None:
        super().__init__(f"loss {loss:.3f} at step {step} is a spike: going back to step {back_to}")
        self.step, self.loss, self.back_to = step, loss, back_to


class LossSpike(Callback):
    """Compares each logged loss/main with the `window` logged before. A spike ends the steps since the last checkpoint
    before it: the run goes back there and continues with the samples that follow (as PaLM did, arXiv 2204.02311 §5.1).

    threshold: a loss is a spike if (loss - median) / (1.4826 · median absolute deviation) is at least this.
    max_returns: number of returns in the whole run. Later spikes, and those without an earlier checkpoint, only print a
        line.

    Saves the window in checkpoints. Each return is recorded in returns.json of the run's folder with all skips so far
    (`skips.Skip`), which checkpoints hold, too: a run that is killed and resumed draws the same samples.
    """

    def __init__(self, threshold: float = 6.0, window: int = 50, max_returns: int = 3) -> None:
        LossSpikeSettings(threshold=threshold, window=window, max_returns=max_returns)
        self.threshold, self.window, self.max_returns = threshold, window, max_returns
        self.losses: list[float] = []
        self.returns = 0

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses = list(state_dict["losses"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        require_data(trainer, self, "skips")
        records = trainer.strategy.broadcast(read_returns(Path(trainer.default_root_dir)))
        self.returns = len(records)
        if records:
            trainer.datamodule.skips = [(at, length) for at, length in records[-1]["skips"]]  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not (is_last_micro_batch(trainer, batch_idx) and is_log_step(trainer, step)):
            return
        loss = latest_scalars(trainer).get("loss/main")
        if loss is None:  # all steps since the last log were skipped
            return
        spiked = len(self.losses) == self.window and is_spike(loss, self.losses, self.threshold)
        if bool(trainer.strategy.reduce(torch.tensor(int(spiked), device=pl_module.device), reduce_op="max")):
            self.go_back(trainer, step, loss)
        self.losses = [*self.losses, loss][-self.window :]

    def go_back(self, trainer: Trainer, step: int, loss: float) -> None:
        """Raises LossSpiked, unless that isn't possible; then prints why."""
        before = step - trainer.log_every_n_steps  # type: ignore[attr-defined]  # the loss is a mean over steps since
        earlier = [step_in(path) for path in resumable_files(checkpoint_folder(trainer)) if step_in(path) <= before]
        back_to = trainer.strategy.broadcast(max(earlier, default=None))
        if back_to is not None and self.returns < self.max_returns:
            raise LossSpiked(step, loss, back_to)
        if trainer.is_global_zero:
            reason = "no checkpoint is older" if back_to is None else f"after {self.returns} returns (max_returns)"
            print(f"step {step}: loss {loss:.3f} is a spike; the run goes on, {reason}", flush=True)


def is_spike(loss: float, losses: list[float], threshold: float) -> bool:
    """Whether the loss is at least `threshold` robust standard deviations above the median of the earlier losses.

    >>> is_spike(2.3, [2.0, 2.1, 1.9, 2.0], 6), is_spike(4.0, [2.0, 2.1, 1.9, 2.0], 6), is_spike(0.1, [2.0, 2.0], 6)
    (False, True, False)
    """
    median = statistics.median(losses)
    spread = 1.4826 * statistics.median(abs(other - median) for other in losses)
    return loss - median >= threshold * max(spread, LEAST_SPREAD * abs(median))


def read_returns(folder: Path) -> list[dict[str, Any]]:
    """The returns of the run in this folder, oldest first."""
    path = folder / RETURNS
    return read_json(path)["returns"] if path.is_file() else []


def returns_text(records: list[dict[str, Any]]) -> str:
    """The content of returns.json."""
    return json.dumps({"returns": records}, indent=1) + "\n"
