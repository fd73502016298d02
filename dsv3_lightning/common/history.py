"""The curves of a run, read from its event files."""

from pathlib import Path


def scalar_history(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """All curves of a run from its event files, over all its lives: {tag: (steps, values)}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: ([event.step for event in events.Scalars(tag)], [event.value for event in events.Scalars(tag)])
        for tag in events.Tags()["scalars"]
    }
