"""Small matplotlib figures for TensorBoard and the report. matplotlib is imported when one is drawn."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(values_LE: Tensor, title: str, center: float) -> "Figure":
    """MoE layers × experts, colours even around `center`: blue below, red above."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, experts = values_LE.shape
    figure = Figure(figsize=(9, 1.6 + 0.28 * min(layers, 40)), layout="constrained")
    axes = figure.add_subplot()
    spread = max(float((values_LE - center).abs().max()), 1e-6)
    image = axes.imshow(
        values_LE.double().numpy(), aspect="auto", cmap="RdBu_r", vmin=center - spread, vmax=center + spread,
        interpolation="nearest",
    )  # fmt: skip
    axes.set(title=title, xlabel="expert", ylabel="MoE layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True))
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
    axes.legend()
    return figure
