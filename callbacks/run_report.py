"""report.md and report.json: the run's results on one page, with figures and the next command."""

import platform
import shlex
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dsv3_lightning import __version__
from dsv3_lightning.callbacks.checkpoint import checkpoint_folder
from dsv3_lightning.callbacks.protocol import all_biases, require, require_data, require_model
from dsv3_lightning.callbacks.router_monitor import RouterMonitor
from dsv3_lightning.callbacks.router_probe import RouterProbe
from dsv3_lightning.callbacks.sample_text import SampleText
from dsv3_lightning.callbacks.throughput import Throughput, peak_memory
from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.history import scalar_history
from dsv3_lightning.common.paths import display_path
from dsv3_lightning.common.plots import curves, heat_map, save_figure
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.parallel.checkpoints.names import step_files
from dsv3_lightning.planning.parameters import count_parameters
from dsv3_lightning.training.logging import latest_scalars, planned_steps

CURVES = ("loss/main", "loss/mtp_1", "val/loss", "val/mtp_1")
COMPRESSORS = ("gzip_bpb", "xz_bpb", "gzip_stream_bpb", "xz_stream_bpb")
PACKAGES = ("torch", "lightning", "torchmetrics", "tokenizers", "omegaconf", "tensorboard")


class RunReport(Callback):
    """Writes the report to `trainer.default_root_dir` after a fit, or after a validation of a finished run.

    Units are SI, shares are between 0 and 1, and null means not measured. The state is the wall time of earlier starts.
    """

    def __init__(self) -> None:
        self.earlier_seconds, self.start = 0.0, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"wall_seconds": self.wall_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier_seconds = state_dict["wall_seconds"]

    @property
    def wall_seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.start

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_model(pl_module, self)
        require(pl_module, self, "steps_done", "skipped_steps")
        require_data(trainer, self, "manifest", "tokens_before", "passes", "gzip_bpb")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_fit_start(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step >= planned_steps(trainer):
            self.write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: Any) -> None:
        bias_LE = all_biases(trainer, pl_module) if pl_module.model.config.num_moe_layers else None
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        report = self.facts(trainer, pl_module)
        history = scalar_history(folder)
        loss = curves({tag: history[tag] for tag in CURVES if tag in history}, "loss, nats per token")
        save_figure(loss, folder / "loss.png")
        if bias_LE is not None:
            save_figure(heat_map(bias_LE.cpu(), "expert bias at the end", 0.0), folder / "bias.png")
        samples = find(trainer, SampleText)
        write_file(folder / "report.json", strict_json(report, indent=2) + "\n")
        learned = trainer.datamodule.manifest["splits"]["train"]  # type: ignore[attr-defined]
        command = next_command(folder, samples.prompts if samples else [], "answer_bytes" in learned)
        text = markdown(report, folder, samples.latest if samples else [], bias_LE is not None, command)
        write_file(folder / "report.md", text)
        print(f"report: {display_path(folder / 'report.md')}", flush=True)

    def facts(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """The content of report.json."""
        scalars = latest_scalars(trainer)
        speed, router, probe = (find(trainer, kind) for kind in (Throughput, RouterMonitor, RouterProbe))
        rates = speed.rates(speed.total, trainer.world_size) if speed else {}
        config, data = pl_module.model.config, trainer.datamodule  # type: ignore[attr-defined]
        counts = count_parameters(config)
        newest = step_files(checkpoint_folder(trainer))
        steps = pl_module.steps_done
        return {
            "steps": steps,
            "tokens": data.tokens_before(steps),
            "passes": data.passes(steps),
            "wall_seconds": self.wall_seconds,
            "tokens_per_second": rates.get("tokens_per_second"),
            "model_flops_per_second": rates.get("model_flops_per_second"),
            "peak_flops_per_second": speed.peak_flops if speed else None,
            "measured_peak_flops_per_second": speed.measured_peak if speed else None,
            "mfu": rates.get("mfu"),
            "precision": str(trainer.precision),
            "data_wait_share": rates.get("data_wait_share"),
            "peak_memory_bytes": peak_memory(),
            "parameters": counts.total,
            "active_parameters": counts.active,
            "train_loss": scalars.get("loss/main"),
            "val_loss": scalars.get("val/loss"),
            "val_bpb": scalars.get("val/bpb"),
            "gzip_bpb": data.gzip_bpb,
            "sources": by_source(data, scalars, steps),
            "mtp_loss": [scalars.get(f"val/mtp_{k}") for k in range(1, config.mtp_depth + 1)],
            "mtp_acceptance": [scalars.get(f"mtp/acceptance_{k}") for k in range(1, config.mtp_depth + 1)],
            "max_vio_global": router.max_vio_global if router else None,
            "specialization": probe.specialization if probe else None,
            "max_vio_batch": sum(router.recent) / len(router.recent) if router and router.recent else None,
            "skipped_steps": pl_module.skipped_steps,
            "checkpoint": str(newest[0]) if newest else None,
            "device": f"{trainer.world_size} x {trainer.strategy.root_device.type}, {platform.machine()}, "
            f"{torch.get_num_threads()} threads",
            "versions": {"dsv3-lightning": __version__, "python": platform.python_version()}
            | {name: version(name) for name in PACKAGES},
        }


def by_source(data: Any, scalars: dict[str, float], steps: int) -> dict[str, dict[str, Any]]:
    """Loss, bits per byte, those of gzip and xz, and passes for each name in data.sources."""
    names = getattr(data, "source_names", [])
    passes, compressed = (data.passes_by_source(steps), data.compressed) if names else ({}, {})
    return {
        name: {
            "val_loss": scalars.get(f"sources/loss_{name}"),
            "val_bpb": scalars.get(f"sources/bpb_{name}"),
            **{key: compressed.get(name, {}).get(key) for key in COMPRESSORS},
            "passes": passes.get(name),
        }
        for name in names
    }


def source_table(sources: dict[str, dict[str, Any]]) -> str:
    """The sources in Markdown; empty without any."""
    if not sources:
        return ""
    heads = [
        "source",
        "validation loss",
        "bits per byte",
        "gzip -9",
        "xz -6",
        "gzip, one stream",
        "xz, one stream",
        "passes",
    ]
    rows = [
        [name, *("-" if value is None else f"{value:.3f}" for value in values.values())]
        for name, values in sources.items()
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])
    return (
        f"## By source\n\n{table}\n\nBits per byte of the validation text. gzip and xz get each document alone, as the "
        "model does, or all of a source in one stream.\n\n"
    )


def find(trainer: Trainer, kind: type) -> Any | None:
    """The run's callback of this class, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]


def markdown(report: dict[str, Any], folder: Path, samples: list[str], has_bias: bool, command: str) -> str:
    """The text of report.md, with the most important numbers first, each explained."""

    def show(value: Any, form: str = "{:.3f}") -> str:
        if isinstance(value, list):
            return ", ".join(show(item, form) for item in value) or "none"
        return "not measured" if value is None else form.format(value)

    rows = [
        ("validation loss, nats per token", show(report["val_loss"])),
        ("bits per byte of validation text", show(report["val_bpb"])),
        ("gzip -9 on the same text, bits per byte", show(report["gzip_bpb"])),
        ("MTP loss by depth", show(report["mtp_loss"])),
        ("share of MTP drafts that greedy decoding would accept, by depth", show(report["mtp_acceptance"])),
        ("MaxVio over the validation set, by MoE layer (0 is balance)", show(report["max_vio_global"], "{:.2f}")),
        ("specialization by origin of the text, by MoE layer (0 is none)", show(report["specialization"], "{:.3f}")),
        ("MaxVio of a batch, mean of the last 50 steps", show(report["max_vio_batch"], "{:.2f}")),
        ("parameters, all and active", f"{report['parameters']:,} and {report['active_parameters']:,}"),
        ("steps and tokens", f"{report['steps']:,} and {report['tokens']:,}"),
        ("passes over the training data", show(report["passes"], "{:,.3g}")),
        ("wall time", f"{report['wall_seconds']:.0f} s"),
        ("tokens per second", show(report["tokens_per_second"], "{:,.0f}")),
        ("model FLOP/s and share of the device's peak (MFU)", f"{show(report['model_flops_per_second'], '{:.3g}')}, "
         f"{show(report['mfu'], '{:.0%}')} of {show(report['peak_flops_per_second'], '{:.3g}')}"),
        ("waiting for data", show(report["data_wait_share"], "{:.2%}")),
        ("peak memory", f"{report['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ("precision, device", f"{report['precision']}, {report['device']}"),
        ("skipped steps", str(report["skipped_steps"])),
        ("checkpoint", f"`{report['checkpoint']}`"),
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    pictures = "![loss](loss.png)\n" + ("\n![expert bias](bias.png)\n" if has_bias else "")
    written = "".join(f"```\n{text}\n```\n\n" for text in samples)
    return (
        f"# {folder.name}\n\n| | |\n| --- | --- |\n{table}\n\n{source_table(report['sources'])}{pictures}\n"
        + (f"## What it writes\n\n{written}" if samples else "")
        + f"## Next\n\n{command}; `tensorboard --logdir {shlex.quote(str(folder.parent))}` shows every curve.\n"
    )


def next_command(folder: Path, prompts: list[str], conversations: bool) -> str:
    """The command to try the model: `chat` if it was trained on conversations, else `generate`."""
    name = shlex.quote(str(folder))
    if conversations:
        return f"`dsv3 chat {name}` talks with it"
    prompt = shlex.quote(prompts[0].strip("\n")) if prompts and prompts[0].strip() else '"Once upon a time"'
    return f"`dsv3 generate {name} --prompt {prompt}` continues a prompt"
