"""The curves of a run, read from its event files."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def scalar_history(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """All curves of a run from its event files, over all its sessions: {tag: (steps, values)}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    with expecting_several_lives():
        events.Reload()
    return {
        tag: ([event.step for event in events.Scalars(tag)], [event.value for event in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }


@contextmanager
def expecting_several_lives() -> Iterator[None]:
    """Keeps TensorBoard from warning that steps come again, which they do in each run that was killed and went on."""

    def unexpected(record: logging.LogRecord) -> bool:
        return "out of order" not in record.getMessage()

    logger = logging.getLogger("tensorboard")
    logger.addFilter(unexpected)
    try:
        yield
    finally:
        logger.removeFilter(unexpected)
