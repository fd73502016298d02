"""Small matplotlib figures for TensorBoard and the report. matplotlib is imported when one is drawn."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(values: ArrayLike, title: str, center: float, rows: str | list[str] = "MoE layer") -> "Figure":
    """Rows × experts: blue below `center`, white there, red above.

    center 0: even around it. center 1: of ratios, from 0 to the largest, at least 2. rows: what they are, or a name
    for each.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = np.asarray(values, dtype=np.float64)
    count = len(numbers)
    figure = Figure(figsize=(9, 1.6 + 0.28 * min(count, 18)), layout="constrained")
    axes = figure.add_subplot()
    reach = max(float(np.nan_to_num(np.abs(numbers - center)).max()), 1.0 if center else 1e-6)
    norm = TwoSlopeNorm(center, 0.0 if center else -reach, center + reach)
    image = axes.imshow(numbers, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    axes.set(title=title, xlabel="expert")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if isinstance(rows, str):
        axes.set_ylabel(rows)
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    else:
        axes.set_yticks(range(count), rows, fontsize="small")
    figure.colorbar(image)
    return figure


def curves(series: dict[str, tuple[list[int], list[float]]], title: str) -> "Figure":
    """Lines over optimizer steps, from {label: (steps, values)}."""
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
