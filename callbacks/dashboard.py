"""The TensorBoard layout: curves grouped by question, and the run's settings in the HParams tab."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from dsv3_lightning import callbacks
from dsv3_lightning.callbacks.charts import QUESTIONS, Charts
from dsv3_lightning.callbacks.settings import CLASSES
from dsv3_lightning.training.module import PretrainModule

EVENTS = "events.out.tfevents.*"
Layout = dict[str, dict[str, list[Any]]]
VARIED = (  # settings that the shipped experiments vary or that distinguish models
    "callbacks.expert_bias.speed", "callbacks.expert_bias.rule", "loss.", "optimizer.kind", "optimizer.lr",
    "model.attention", "model.expert_bias_kind", "model.kv_lora_rank", "model.norm_topk_prob", "model.q_lora_rank",
    "model.qk_", "compute.fp8",
    "model.hidden_size", "model.moe_intermediate_size", "model.mtp_kind", "model.n_", "model.num_", "model.topk_group",
    "model.scoring_func", "model.v_head_dim",
)  # fmt: skip
ASIDE = (  # settings for paths, intervals and the amount of output, by which nobody compares runs
    "callbacks.checkpoint", "callbacks.progress", "callbacks.router_monitor", "callbacks.run_report",
    "callbacks.sample_text", "callbacks.throughput", "data.cache_dir", "data.num_workers", "data.paths",
    "data.tokenizer", "data.vocab_size", "init_from", "run.", "trainer.accelerator", "trainer.devices",
    "trainer.limit_val_batches", "trainer.log_every_n_steps", "trainer.num_nodes", "trainer.precision",
    "trainer.val_check_interval",
)  # fmt: skip


def layout(tree: dict[str, Any], origins: int) -> Layout:
    """{question: {chart: [kind, tags]}} for a run's settings; the number of charts doesn't grow with the layers.

    origins: number of origins of the validation text. Charts whose curves nothing in the run logs are left out.
    """
    declared = logged_tags(tree, origins)
    places: dict[Any, tuple[str, str]] = {
        key: (question, title) for question, charts in QUESTIONS.items() for key, title in charts.items()
    }
    places |= {key: key for key in declared if isinstance(key, tuple)}
    assert declared.keys() <= places.keys(), f"charts without a title: {declared.keys() - places.keys()}"
    drawn: Layout = {question: {} for question in QUESTIONS}
    for key, (question, title) in places.items():
        if tags := declared.get(key):
            drawn[question][title] = ["Multiline", tags]
    return {question: charts for question, charts in drawn.items() if charts}


def logged_tags(tree: dict[str, Any], origins: int) -> Charts:
    """{chart: tags} of everything that the run's module and callbacks log."""
    declared: Charts = {}
    on = {name for name, settings in tree["callbacks"].items() if settings is not None}
    for source in (PretrainModule, *logging_callbacks(on)):
        for key, tags in source.charts(tree, origins).items():
            declared.setdefault(key, []).extend(tags)
    return declared


def logging_callbacks(names: Iterable[str]) -> list[Any]:
    """Those of our callback classes that declare charts, of the callbacks with these names."""
    named = [getattr(callbacks, CLASSES[name]) for name in CLASSES if name in names]
    return [kind for kind in named if hasattr(kind, "charts")]


class RunLogger(TensorBoardLogger):
    """A logger that writes event files directly into the run's folder and, on resume, purges what was logged later.

    `purge_step` informs an open dashboard; `rewind` makes the files agree with the checkpoint, which was written
    before or after the validation of its step."""

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
        """{name of an event file: bytes written so far}, on the first rank; empty on the others."""
        if rank_zero_only.rank:  # type: ignore[attr-defined]  # Lightning hangs the rank on this function
            return {}
        self.save()
        return {path.name: path.stat().st_size for path in sorted(Path(self.log_dir).glob(EVENTS))}

    def rewind(self, position: dict[str, int]) -> None:
        """Removes what was logged after `position`, so that recomputed steps don't appear twice."""
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            return
        for path in self.earlier:
            if path.name in position:
                os.truncate(path, min(position[path.name], path.stat().st_size))
            else:
                path.unlink()

    def describe(self, tree: dict[str, Any], origins: int, defaults: dict[str, Any]) -> None:
        """Writes the layout and the HParams row once per run, at its first start. defaults: the values of base.yaml."""
        self.experiment.add_custom_scalars(layout(tree, origins))
        for summary in hparams_row(flatten(tree), flatten(defaults)):
            self.experiment.file_writer.add_summary(summary)


def hparams_row(settings: dict[str, Any], defaults: dict[str, Any]) -> tuple[Summary, Summary, Summary]:
    """The records of the HParams tab. TensorBoard lists settings that `differ` first, and each part by name."""
    experiment, start, end = hparams(settings, {"val/loss": 0.0, "val/bpb": 0.0})
    plugin = experiment.value[0].metadata.plugin_data
    content = metadata.parse_experiment_plugin_data(plugin.content)
    for info in content.hparam_infos:
        info.differs = is_compared(info.name, settings[info.name], defaults)
    plugin.content = HParamsPluginData(experiment=content, version=metadata.PLUGIN_DATA_VERSION).SerializeToString()
    return experiment, start, end


def is_compared(key: str, value: Any, defaults: dict[str, Any]) -> bool:
    """Whether people compare runs by this setting: experiments vary it, or it differs from base.yaml."""
    if key.startswith((*VARIED, *ASIDE)):
        return key.startswith(VARIED)
    switched_off = any(other.startswith(f"{key}.") for other in defaults)  # a section set to null
    return switched_off or (key in defaults and value != defaults[key] and "${" not in str(defaults[key]))


def flatten(tree: Any, key: str = "") -> dict[str, Any]:
    """{dotted key: number, text or bool}; lists and null become text."""
    if isinstance(tree, dict):
        return {
            path: value for name in tree for path, value in flatten(tree[name], f"{key}.{name}".lstrip(".")).items()
        }
    return {key: tree if isinstance(tree, bool | int | float | str) else str(tree)}
