"""How TensorBoard opens: curves grouped by question, and the run's settings in the HParams tab."""

from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

Layout = dict[str, dict[str, list[Any]]]


def layout(tree: dict[str, Any]) -> Layout:
    """{question: {chart: [kind, tags]}} for a run's settings: as many charts for 60 layers as for three.

    A tag is a regular expression that must match from the tag's beginning. Layers have charts of their own where the
    run logs their curves.
    """
    depth = tree["model"]["num_nextn_predict_layers"]
    balance: dict[str, list[Any]] = {
        "MaxVio: a batch, a micro-batch, the validation set (0 is balance)": lines(
            "balance/max_vio$", "balance/max_vio_micro$", "balance/max_vio_global$"
        ),
        "MaxVio of the worst layer": lines("balance/max_vio_worst$"),
        "busiest, typical and idlest expert (1 is a fair share)": lines(
            "balance/load_max", "balance/load_p95", "balance/load_p50", "balance/load_p5$", "balance/load_min"
        ),
        "share of experts without a token": lines("balance/dead_experts"),
        "unevenness: variation, entropy (0 and 1 are balance)": lines("balance/load_cv", "balance/load_entropy"),
        "what the bias does: spread, mean, largest": lines(
            "balance/bias_spread", "balance/bias_mean", "balance/bias_absmax"
        ),
        "how fast the bias moves": lines("balance/bias_speed"),
        "balance losses": lines("loss/balance"),
        "how strong they are: factors": lines("balance/factor"),
        "how clear choices are: the last chosen over the first left out": lines("balance/margin"),
        "groups: reached per token, the busiest's load": lines("balance/groups_per_token", "balance/group_load_max"),
        "most attached pair of experts (1 is chance)": lines("balance/coactivation_max"),
        "how differently text of different origin is routed (0 is alike)": lines("balance/specialization"),
    }
    mtp = {
        "loss by depth": lines(r"loss/mtp_\d+", r"val/mtp_\d+"),
        "share of guesses that decoding would keep": lines(r"mtp/acceptance_\d+"),
        "weight of the MTP loss": lines("mtp/weight"),
    }
    monitor = tree["callbacks"].get("router_monitor") or {}
    layers = {
        "MaxVio of a batch": lines(r"balance/max_vio_layer_\d+"),
        "MaxVio over the validation set": lines(r"balance/max_vio_global_layer_\d+"),
    }
    questions = {
        "is it learning": {
            "loss: training, validation": lines("loss/main", "val/loss"),
            "bits per byte of validation text": lines("val/bpb"),
            "learning rate": lines("optimizer/lr"),
        },
        "is it balanced": balance if monitor else {},
        "which layer is it": layers if monitor.get("per_layer") else {},
        "is MTP helping": mtp if depth else {},
        "is it fast": {
            "tokens per second": lines("throughput/tokens_per_second"),
            "share of the device's peak": lines("throughput/mfu"),
            "waiting for data": lines("throughput/data_wait_share"),
            "memory": lines("throughput/memory_bytes"),
        },
        "is it healthy": {
            "gradient norm: all, the routers'": lines("optimizer/grad_norm", "balance/router_grad_norm"),
            "skipped steps": lines("optimizer/skipped_steps"),
        },
    }
    return {question: charts for question, charts in questions.items() if charts}


def lines(*tags: str) -> list[Any]:
    return ["Multiline", list(tags)]


class RunLogger(TensorBoardLogger):
    """Event files straight in the run's folder. A resumed run purges what an earlier life logged after its step."""

    def __init__(self, folder: str, resume_step: int | None) -> None:
        purge_step = None if resume_step is None else resume_step + 1
        super().__init__(save_dir=folder, name="", version="", default_hp_metric=False, purge_step=purge_step)

    def save(self) -> None:
        self.experiment.flush()  # the base class would also write a hparams.yaml; config.yaml holds everything

    def describe(self, tree: dict[str, Any]) -> None:
        """Writes the layout and the HParams row: once per run, in its first life."""
        self.experiment.add_custom_scalars(layout(tree))
        for summary in hparams(flatten(tree), {"val/loss": 0.0, "val/bpb": 0.0}):
            self.experiment.file_writer.add_summary(summary)


def flatten(tree: Any, key: str = "") -> dict[str, Any]:
    """{dotted key: number, text or truth value}; lists and null as text."""
    if isinstance(tree, dict):
        return {
            path: value for name in tree for path, value in flatten(tree[name], f"{key}.{name}".lstrip(".")).items()
        }
    return {key: tree if isinstance(tree, bool | int | float | str) else str(tree)}
