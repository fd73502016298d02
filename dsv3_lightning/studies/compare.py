"""`dsv3 compare`: compares finished runs, averaged over seeds, in a table, as Markdown and as curves."""

import argparse
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.history import scalar_history
from dsv3_lightning.common.paths import path_argument
from dsv3_lightning.common.plots import save_figure
from dsv3_lightning.common.table import table
from dsv3_lightning.config.schema import Config
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.planning.memory import cache_per_token
from dsv3_lightning.runs.record import finished_below, read_report, stored_config
from dsv3_lightning.studies.equality import first_difference, points

SEED = re.compile(r"-seed\d+$")
SPEED = "throughput/tokens_per_second"


@dataclass(frozen=True)
class Finished:
    """A run's folder, its settings and its report."""

    folder: Path
    config: Config
    report: dict[str, Any]


def mean_or_none(values: list[float | None] | None) -> float | None:
    present = [value for value in values or [] if value is not None]
    return statistics.fmean(present) if present else None


COLUMNS: dict[str, tuple[str, Callable[[Finished], float | None]]] = {  # header -> format, value of a run
    "val loss": ("{:.3f}", lambda run: run.report["val_loss"]),
    "bits/byte": ("{:.3f}", lambda run: run.report["val_bpb"]),
    "MaxVio global": ("{:.2f}", lambda run: mean_or_none(run.report["max_vio_global"])),
    "MaxVio batch": ("{:.2f}", lambda run: run.report["max_vio_batch"]),
    "specialization": ("{:.3f}", lambda run: mean_or_none(run.report["specialization"])),
    "MTP accepted": ("{:.3f}", lambda run: (run.report["mtp_acceptance"] or [None])[0]),
    "tokens/s": ("{:,.0f}", lambda run: run.report["tokens_per_second"]),
    "parameters": ("{:,.0f}", lambda run: run.report["parameters"]),
    "active": ("{:,.0f}", lambda run: run.report["active_parameters"]),
    "cache/token": ("{:,.0f}", lambda run: cache_per_token(run.config.model)),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=path_argument, nargs="+", metavar="RUN", help="folders of runs, or of experiments")
    parser.add_argument("--markdown", type=path_argument, metavar="FILE", help="also write the table to FILE")
    parser.add_argument("--plot", type=path_argument, metavar="FILE", help="draw the curves to FILE, as PNG")
    help = "test whether two runs have the same curves to the bit, and name the first step that differs"
    parser.add_argument("--equal", action="store_true", help=help)


def run(runs: list[Path], markdown: Path | None, plot: Path | None, equal: bool) -> int:
    """Prints a row per variant: means over its seeds, ± their standard deviation. Empty columns are left out.

    equal: compares the curves of two runs instead, and returns 1 where they differ.
    """
    if equal:
        return compare_to_the_bit(runs)
    groups = grouped(find_runs(runs))
    rows = comparison(groups)
    print(table(rows))
    print("± is the standard deviation over seeds; cache/token is in numbers; runs that shared a machine are slower")
    if markdown is not None:
        write_file(markdown, markdown_table(rows))
    if plot is not None:
        save_figure(curves_by_group(groups), plot)
    return 0


def compare_to_the_bit(runs: list[Path]) -> int:
    """Whether two runs, finished or not, have the same curves. Raises ConfigError where one has none."""
    if len(runs) != 2:
        raise ConfigError(f"--equal compares two runs, {len(runs)} are given")
    histories = [scalar_history(folder) if folder.is_dir() else {} for folder in runs]
    for folder, history in zip(runs, histories, strict=True):
        if not history:
            raise ConfigError(f"{folder}: holds no event files of a run")
    difference = first_difference(*histories)
    curves, values = points(histories[0])
    print(difference or f"equal to the bit: {curves} curves with {values:,} points (throughput left out)")
    return 0 if difference is None else 1


def find_runs(paths: list[Path]) -> list[Finished]:
    """The finished runs in or below these folders. Raises ConfigError for a folder without one."""
    folders: list[Path] = []
    for path in paths:
        found = finished_below(path)
        if not found:
            raise ConfigError(f"{path}: holds no finished run (no report.json there, nor in a folder below)")
        folders += found
    return [Finished(folder, stored_config(folder), read_report(folder) or {}) for folder in dict.fromkeys(folders)]


def grouped(runs: list[Finished]) -> dict[str, list[Finished]]:
    """Runs grouped by name without the seed, in the order of the experiment's file, if any. Raises ConfigError."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        label = SEED.sub("", run.folder.name)
        first = groups.setdefault(label, []) or [run]
        if (first[0].config.model, first[0].config.loss) != (run.config.model, run.config.loss):
            raise ConfigError(
                f"{run.folder}: has a different model or loss than {first[0].folder}, which has the same name"
            )
        groups[label].append(run)
    return groups


def values_of(runs: list[Finished], value: Callable[[Finished], float | None]) -> list[float]:
    return [number for run in runs if (number := value(run)) is not None]


def comparison(groups: dict[str, list[Finished]], leave_out: tuple[str, ...] = ()) -> list[list[str]]:
    """Header and rows of the table, without empty columns. Values that are equal for all seeds have no ±."""
    kept = {
        name: column
        for name, column in COLUMNS.items()
        if name not in leave_out and any(values_of(runs, column[1]) for runs in groups.values())
    }
    rows = [["variant", "seeds", *kept]]
    for label, runs in groups.items():
        cells = [spread(values_of(runs, value), form) for form, value in kept.values()]
        rows.append([label, str(len(runs)), *cells])
    return rows


def spread(values: list[float], form: str = "{:.3f}") -> str:
    """Mean ± sample standard deviation.

    >>> spread([1.0, 2.0, 3.0]), spread([2.0, 2.0]), spread([])
    ('2.000 ± 1.000', '2.000', '-')
    """
    if not values:
        return "-"
    mean = form.format(statistics.fmean(values))
    if len(values) < 2 or len(set(values)) == 1:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values))}"


def markdown_table(rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table. left: number of leading columns aligned left; the others are aligned right."""
    header, *body = rows
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def curves_by_group(groups: dict[str, list[Finished]], leave_out: tuple[str, ...] = ()) -> Any:
    """A figure of the logged PANELS over steps, without the tags in `leave_out`.

    A line is a variant's mean over seeds and a band the range from the lowest to the highest seed. A variant has the
    same color in all panels.
    """
    from matplotlib.figure import Figure

    histories = {label: [scalar_history(run.folder) for run in runs] for label, runs in groups.items()}
    logged = {tag for runs in histories.values() for run in runs for tag in run}
    shown = {tag: title for tag, title in PANELS.items() if tag in logged and tag not in leave_out}
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    places = figure.subplots(rows, 2, squeeze=False).flatten().tolist()
    for axes in places[len(shown) :]:
        axes.remove()
    lines: dict[str, Any] = {}  # each variant's line in the last panel that has one, for the legend
    for axes, (tag, title) in zip(places, shown.items(), strict=False):
        for number, (label, runs) in enumerate(histories.items()):
            curves = [dict(zip(*run[tag], strict=True)) for run in runs if tag in run]
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            if steps:
                at = [[curve[step] for curve in curves] for step in steps]
                means = [statistics.fmean(values) for values in at]
                (lines[label],) = axes.plot(steps, means, label=label, color=f"C{number}")
                axes.fill_between(steps, [min(v) for v in at], [max(v) for v in at], color=f"C{number}", alpha=0.2)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
    in_order = [lines[label] for label in histories if label in lines]
    note = "means over seeds; bands from the lowest to the highest"
    figure.legend(handles=in_order, loc="outside lower center", ncols=min(len(in_order), 6), title=note)
    return figure


PANELS = {
    "val/loss": "validation loss",
    "val/bpb": "bits per byte of validation text",
    "balance/max_vio": "MaxVio of a batch (0 is balance)",
    "balance/max_vio_global": "MaxVio over the validation set",
    "mtp/acceptance_1": "share of MTP's first drafts that are accepted",
    SPEED: "tokens per second",
}
