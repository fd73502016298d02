"""How TensorBoard opens: curves grouped by question, and the run's settings in the HParams tab."""

from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

LAYOUT = {
    "is it learning": {
        "loss": ["Multiline", ["loss/main", "val/loss"]],
        "bits per byte": ["Multiline", ["val/bpb"]],
        "learning rate": ["Multiline", ["optimizer/lr"]],
    },
    "is it balanced": {
        "MaxVio": ["Multiline", ["balance/max_vio$", "balance/max_vio_global$"]],
        "MaxVio over the validation set by layer": ["Multiline", [r"balance/max_vio_global_layer_\d+"]],
        "busiest and idlest expert": ["Multiline", ["balance/load_max", "balance/load_min"]],
        "expert bias": ["Multiline", ["balance/bias_absmax"]],
        "balance loss": ["Multiline", ["loss/balance"]],
    },
    "is MTP helping": {
        "MTP loss": ["Multiline", [r"loss/mtp_\d+", r"val/mtp_\d+"]],
        "MTP weight": ["Multiline", ["mtp/weight"]],
    },
    "is it fast": {
        "tokens per second": ["Multiline", ["throughput/tokens_per_second"]],
        "share of the device's peak": ["Multiline", ["throughput/mfu"]],
        "waiting for data": ["Multiline", ["throughput/data_wait_share"]],
        "memory": ["Multiline", ["throughput/memory_bytes"]],
    },
    "is it healthy": {
        "gradient norm": ["Multiline", ["optimizer/grad_norm"]],
        "skipped steps": ["Multiline", ["optimizer/skipped_steps"]],
    },
}


class RunLogger(TensorBoardLogger):
    """Event files straight in the run's folder. A resumed run purges what an earlier life logged after its step."""

    def __init__(self, folder: str, resume_step: int | None) -> None:
        purge_step = None if resume_step is None else resume_step + 1
        super().__init__(save_dir=folder, name="", version="", default_hp_metric=False, purge_step=purge_step)

    def save(self) -> None:
        self.experiment.flush()  # the base class would also write a hparams.yaml; config.yaml holds everything

    def describe(self, tree: dict[str, Any]) -> None:
        """Writes the layout and the HParams row: once per run, in its first life."""
        self.experiment.add_custom_scalars(LAYOUT)
        for summary in hparams(flatten(tree), {"val/loss": 0.0, "val/bpb": 0.0}):
            self.experiment.file_writer.add_summary(summary)


def flatten(tree: Any, key: str = "") -> dict[str, Any]:
    """{dotted key: number, text or truth value}; lists and null as text."""
    if isinstance(tree, dict):
        return {
            path: value for name in tree for path, value in flatten(tree[name], f"{key}.{name}".lstrip(".")).items()
        }
    return {key: tree if isinstance(tree, bool | int | float | str) else str(tree)}
