"""How TensorBoard opens: curves grouped by question, and the run's settings in the HParams tab."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.tensorboard.summary import hparams

EVENTS = "events.out.tfevents.*"
Layout = dict[str, dict[str, list[Any]]]


def layout(tree: dict[str, Any], origins: int) -> Layout:
    """{question: {chart: [kind, tags]}} for a run's settings: as many charts for 60 layers as for three.

    origins: of how many the validation text is. A chart is there where something that the run has logs its curves:
    callbacks go by their names in base.yaml. A tag is a regular expression that must match from the tag's beginning.
    Layers have charts of their own where the run logs their curves.
    """
    model = tree["model"]
    on = {name: block for name, block in tree["callbacks"].items() if block is not None}
    monitor, probe, bias = "router_monitor" in on, "router_probe" in on, "expert_bias" in on
    fast, per_layer = "throughput" in on, monitor and on["router_monitor"].get("per_layer", False)
    mtp, balanced = model["num_nextn_predict_layers"] > 0, tree["loss"]["balance"] not in ("none", ["none"])
    left_out = model["n_routed_experts"] // model["n_group"] * model["topk_group"] > model["num_experts_per_tok"]
    questions = {
        "is it learning": {
            "loss: training, validation": ["loss/main", "val/loss"],
            "bits per byte of validation text": ["val/bpb"],
            "learning rate": ["optimizer/lr"],
        },
        "is it balanced": {
            "MaxVio: a batch, a micro-batch, the validation set (0 is balance)": where(
                monitor, "balance/max_vio$", "balance/max_vio_micro$", "balance/max_vio_global$"
            ),
            "MaxVio of the worst layer": where(monitor, "balance/max_vio_worst$"),
            "busiest, typical and idlest expert (1 is a fair share)": where(
                monitor,
                *("balance/load_max", "balance/load_p95", "balance/load_p50", "balance/load_p5$", "balance/load_min"),
            ),
            "share of experts without a token": where(monitor, "balance/dead_experts"),
            "unevenness: variation, entropy (0 and 1 are balance)": where(
                monitor, "balance/load_cv", "balance/load_entropy"
            ),
            "what the bias does: spread, mean, largest": [
                *where(monitor, "balance/bias_spread", "balance/bias_mean"),
                *where(bias, "balance/bias_absmax"),
            ],
            "how fast the bias moves": where(bias, "balance/bias_speed"),
            "balance losses": where(balanced, "loss/balance"),
            "how strong they are: factors": where(balanced and "balance_factor" in on, "balance/factor"),
            "how clear choices are: the last chosen over the first left out": where(
                probe and left_out, "balance/margin"
            ),
            "groups: reached per token, the busiest's load": [
                *where(probe, "balance/groups_per_token"),
                *where(monitor, "balance/group_load_max"),
            ],
            "most attached pair of experts (1 is chance)": where(probe, "balance/coactivation_max"),
            "how differently text of different origin is routed (0 is alike)": where(
                probe and origins > 1, "balance/specialization"
            ),
        },
        "which layer is it": {
            "MaxVio of a batch": where(per_layer, r"balance/max_vio_layer_\d+"),
            "MaxVio over the validation set": where(per_layer, r"balance/max_vio_global_layer_\d+"),
        },
        "is MTP helping": {
            "loss by depth": where(mtp, r"loss/mtp_\d+", r"val/mtp_\d+"),
            "share of guesses that decoding would keep": where(mtp, r"mtp/acceptance_\d+"),
            "weight of the MTP loss": where(mtp and "mtp_weight" in on, "mtp/weight"),
        },
        "is it fast": {
            "tokens per second": where(fast, "throughput/tokens_per_second"),
            "FLOP per second that the model needs for them": where(fast, "throughput/model_flops_per_second"),
            "share of the device's peak": where(fast, "throughput/mfu"),
            "waiting for data": where(fast, "throughput/data_wait_share"),
            "memory": where(fast, "throughput/memory_bytes"),
        },
        "is it healthy": {
            "gradient norm: all, the routers'": ["optimizer/grad_norm", *where(monitor, "balance/router_grad_norm")],
            "skipped steps": ["optimizer/skipped_steps"],
        },
    }
    drawn = {
        question: {chart: ["Multiline", tags] for chart, tags in charts.items() if tags}
        for question, charts in questions.items()
    }
    return {question: charts for question, charts in drawn.items() if charts}


def where(logged: bool, *tags: str) -> list[str]:
    """The tags, or none where nothing logs them."""
    return list(tags) if logged else []


class RunLogger(TensorBoardLogger):
    """Event files straight in the run's folder. A resumed run purges what earlier lives logged after its step.

    `purge_step` tells a dashboard that is open; `rewind` makes the files themselves agree with the checkpoint, which
    was made before or after its step's validation."""

    def __init__(self, folder: str, resume_step: int | None) -> None:
        purge_step = None if resume_step is None else resume_step + 1
        super().__init__(save_dir=folder, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self.earlier = sorted(Path(folder).glob(EVENTS))

    @property
    def log_dir(self) -> str:
        return str(self.save_dir)  # the base class would replace environment variables in a folder's name

    def save(self) -> None:
        self.experiment.flush()  # the base class would also write a hparams.yaml; config.yaml holds everything

    def position(self) -> dict[str, int]:
        """{name of an event file: bytes written so far}, on the first rank: where the curves stand."""
        if rank_zero_only.rank:  # type: ignore[attr-defined]  # Lightning hangs the rank on this function
            return {}
        self.save()
        return {path.name: path.stat().st_size for path in sorted(Path(self.log_dir).glob(EVENTS))}

    def rewind(self, position: dict[str, int]) -> None:
        """Takes away what earlier lives logged after `position`, so that what is computed again isn't there twice."""
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            return
        for path in self.earlier:
            if path.name in position:
                os.truncate(path, min(position[path.name], path.stat().st_size))
            else:
                path.unlink()

    def describe(self, tree: dict[str, Any], origins: int) -> None:
        """Writes the layout and the HParams row: once per run, in its first life."""
        self.experiment.add_custom_scalars(layout(tree, origins))
        for summary in hparams(flatten(tree), {"val/loss": 0.0, "val/bpb": 0.0}):
            self.experiment.file_writer.add_summary(summary)


def flatten(tree: Any, key: str = "") -> dict[str, Any]:
    """{dotted key: number, text or truth value}; lists and null as text."""
    if isinstance(tree, dict):
        return {
            path: value for name in tree for path, value in flatten(tree[name], f"{key}.{name}".lstrip(".")).items()
        }
    return {key: tree if isinstance(tree, bool | int | float | str) else str(tree)}
