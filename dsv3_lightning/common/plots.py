"""Small matplotlib figures for TensorBoard and the report. matplotlib is imported when one is drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_lightning.common.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike


def heat_map(values: "ArrayLike", title: str, center: float, rows: str | list[str] = "MoE layer") -> "Figure":
    """A heat map of rows × experts: blue below `center`, white at it, red above.

    center 0: a symmetric scale. center 1: ratios, from 0 to the largest, at least 2. rows: what a row is, or a name for
    each row.
    """
    return heat_maps({title: values}, center, rows)


def heat_maps(
    panels: "Mapping[str, ArrayLike]", center: float, rows: str | list[str] = "MoE layer", columns: str = "expert"
) -> "Figure":
    """Heat maps by title, side by side with the same rows and color scale. columns: what a column is; each map counts
    them from 0."""
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    maps = [np.asarray(values, dtype=np.float64) for values in panels.values()]
    count = len(maps[0])
    # Narrow, with many pixels per inch, so that TensorBoard's thumbnails can be read.
    width = 5 if len(maps) == 1 else 9
    figure = Figure(figsize=(width, 1.4 + 0.2 * min(count, 18)), dpi=900 / width, layout="constrained")
    reach = max(1.0 if center else 1e-6, *(float(np.nan_to_num(np.abs(numbers - center)).max()) for numbers in maps))
    norm = TwoSlopeNorm(center, 0.0 if center else -reach, center + reach)
    all_axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, title, numbers in zip(all_axes, panels, maps, strict=True):
        image = axes.imshow(numbers, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
        axes.set_title(title, fontsize="medium", wrap=True)
        axes.set_xlabel(columns)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if isinstance(rows, str):
        all_axes[0].set_ylabel(rows)
        all_axes[0].yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    else:
        all_axes[0].set_yticks(range(count), rows, fontsize="small")
    figure.colorbar(image, ax=list(all_axes))
    return figure


def curves(series: dict[str, tuple[list[int], list[float]]], title: str) -> "Figure":
    """A figure of lines over optimizer steps, from {label: (steps, values)}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, (steps, values) in series.items():
        axes.plot(steps, values, label=label)
    axes.set(title=title, xlabel="optimizer step")
    axes.grid(alpha=0.3)
    if series:
        axes.legend()
    return figure


def save_figure(figure: "Figure", path: Path, dpi: float | None = None) -> None:
    """Writes a figure as PNG, atomically. Raises WriteError."""
    with whole(path) as new:
        figure.savefig(new, format="png", dpi=dpi or "figure")
