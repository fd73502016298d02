"""The batch size ramp over a run's first tokens (V3 §4.2: 3,072 to 15,360 sequences over 469B). Plain Python."""

from dsv3_lightning.data.config import DataConfig


def batch_sizes(config: DataConfig, steps: int) -> list[int]:
    """Samples of each of the run's first `steps` optimizer steps.

    With batch_ramp {start, increment, tokens}: start + i · increment, where i rises evenly with the tokens of the steps
    before, so that batch_size is reached after `tokens` of them. It depends on the settings alone, not on the ranks.
    """
    ramp, full = config.batch_ramp, config.batch_size
    sizes = [full] * steps
    if ramp is None:
        return sizes
    increments = (full - ramp.start) // ramp.increment
    tokens = 0
    for step in range(steps):
        if tokens >= ramp.tokens:
            break
        sizes[step] = ramp.start + tokens * increments // ramp.tokens * ramp.increment
        tokens += sizes[step] * config.sequence_length
    return sizes


def micro_batches(samples: int, largest: int) -> int:
    """The smallest number of equal micro-batches of a rank's samples in a step, each of at most `largest`.

    >>> [micro_batches(samples, 2) for samples in (1, 2, 12, 60)], micro_batches(7, 4)
    ([1, 1, 6, 30], 7)
    """
    return next(number for number in range(-(-samples // largest), samples + 1) if samples % number == 0)


def tokens_of(config: DataConfig, steps: int) -> int:
    """Positions of the run's first `steps` optimizer steps, over all ranks."""
    return sum(batch_sizes(config, steps)) * config.sequence_length
