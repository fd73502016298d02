"""`dsv3 trace`: draws what each rank of a pipeline did in a run, beside what the schedule makes of its times."""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

from dsv3_lightning.common.flags import not_negative
from dsv3_lightning.common.paths import display_path, path_argument
from dsv3_lightning.common.plots import save_figure
from dsv3_lightning.common.table import table
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.planning.pipeline import drawing
from dsv3_lightning.planning.pipeline.measured import measured_times, read_trace, simulated
from dsv3_lightning.planning.pipeline.timeline import Timeline, peak_chunks


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=path_argument, metavar="RUN", help="a run's folder, with traces by callbacks.pipeline_trace")
    add("--step", type=not_negative, metavar="N", help="default: the last one that was traced")
    add("--png", type=path_argument, metavar="FILE", help="also draw both timelines as a figure")


def run(run: Path, step: int | None, png: Path | None) -> int:
    """Prints the timeline of a traced step, the simulated one, and the bubbles of both."""
    found = read_trace(run)
    step = max(found) if step is None else step
    if step not in found:
        raise ConfigError(f"--step {step}: was not traced; must be {', '.join(map(str, found))}")
    measured = found[step]
    expected = simulated(measured, measured_times(found.values()))
    titles = {"measured": f"step {step}, measured", "simulated": "simulated from the chunks' median times"}
    timelines = {"measured": measured, "simulated": expected}
    width = shutil.get_terminal_size().columns
    panels = {titles[name]: timeline for name, timeline in timelines.items()}
    for title, timeline in panels.items():
        print(f"{title}\n{drawing.text(timeline, width)}\n")
    print(bubble_table(timelines))
    if png is not None:
        save_figure(drawing.figure(panels), png)
        print(f"\n{display_path(png)}")
    return 0


def bubble_table(columns: Mapping[str, Timeline]) -> str:
    """A table of timelines of the same lists, by name: span, bubble shares, and by rank what it did and held."""
    rows: list[tuple[str, ...]] = [("", *columns)]

    def row(name: str, form: str, values: list[float]) -> None:
        rows.append((name, *(format(value, form) for value in values)))

    timelines = list(columns.values())
    row("span of a step, s", ".4f", [each.span for each in timelines])
    row("bubble share of all ranks", ".1%", [each.bubble_share for each in timelines])
    row("  from each rank's first to its last action", ".1%", [each.own_bubble_share for each in timelines])
    for rank in range(len(timelines[0].ranks)):
        row(f"rank {rank}: busy, s", ".4f", [each.busy(rank) for each in timelines])
        row("  peak of live chunks", ".0f", [peak_chunks(each.ranks[rank]) for each in timelines])
    return table(rows)
