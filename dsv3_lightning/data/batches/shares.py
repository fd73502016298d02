"""The mixture that a run's settings describe: data.sources with weights or epochs, and data.weights_schedule.

Weights are shares of the run's samples, which are shares of its tokens but for a little padding. A source without a
weight has so many samples of the run as its epochs are. Imports no torch.
"""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from dsv3_lightning.data.batches.mixture import Mixture, plan
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.errors import ConfigError


def mixture_of(
    config: DataConfig, places: Sequence[tuple[int, int]], run_samples: int, first_of: Callable[[int], int]
) -> Mixture:
    """The order of a run over the sources of a mixed config. Raises ConfigError.

    places: each source's first sample in the packed index, and how many it has. run_samples: those that the run draws.
    first_of: the number of the first sample after so many optimizer steps.
    """
    assert config.sources is not None
    sources, counts = config.sources, [count for _, count in places]
    for (name, source), count in zip(sources.items(), counts, strict=True):
        if not count:
            given = f"weight={source.weight}" if source.weight is not None else f"epochs={source.epochs}"
            raise ConfigError(f"data.sources.{name}: has {given}, but no training documents")
    epochs = [source.epochs for source in sources.values()]
    limits = [
        None if most is None else max(1, int(Fraction(str(most)) * count))
        for most, count in zip(epochs, counts, strict=True)
    ]
    weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
    by_epochs = {name: limit or 0 for name, limit in zip(sources, limits, strict=True) if name not in weights}
    rest = run_samples - sum(by_epochs.values())
    if weights and rest <= 0:
        raise ConfigError(
            f"data.sources: the epochs of {' '.join(by_epochs)} are {run_samples - rest:,} samples, and the run draws "
            f"{run_samples:,}; none are left for {' '.join(weights)}"
        )
    schedule: list[tuple[int, list[Fraction]]] = [(0, shares(sources, weights, by_epochs, rest))]
    for change in config.weights_schedule or []:
        weights |= change.weights
        first = first_of(change.at) if change.step is not None else -(-change.at // config.sequence_length)
        schedule.append((first, shares(sources, weights, by_epochs, rest)))
    phases, end = plan(counts, schedule, limits)
    if end is not None and end < run_samples:
        raise ConfigError(
            f"data.sources: all have had their epochs after {end:,} samples, and the run draws {run_samples:,} "
            "(trainer.max_steps x data.batch_size); more epochs or fewer steps make them agree"
        )
    return Mixture(tuple(counts), tuple(first for first, _ in places), phases, end, config.seed)


def shares(names: Iterable[str], weights: dict[str, float], by_epochs: dict[str, int], rest: int) -> list[Fraction]:
    """The samples of each source in the whole run: those of its epochs, or a part of the rest by its weight."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    return [Fraction(by_epochs[name]) if name in by_epochs else rest * exact[name] / total for name in names]
