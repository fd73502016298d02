"""Measured timelines: their files in a run's folder, and the times of chunks in them.

Each rank of a pipeline has a file `pipeline/rank-<r>.jsonl` with a line per traced step:
{"step": 10, "slots": [["0F0", 0.0, 0.012], ["0F1/7B0", 0.012, 0.034], ...]}. A slot is an action, or several that run
together: chunk, kind (F, I, W or B) and micro-batch. Start and end are seconds from a moment that all ranks share.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.json_files import read_text
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.planning.pipeline.actions import Action, Slot
from dsv3_lightning.planning.pipeline.timeline import Event, Timeline, simulate

FOLDER = "pipeline"
ACTION = re.compile(r"(\d{1,6})([FIWB])(\d{1,6})")
Steps = Mapping[int, Sequence[Event]]  # events of a rank by optimizer step


def trace_file(run: Path, rank: int) -> Path:
    return run / FOLDER / f"rank-{rank:05d}.jsonl"


def write_trace(run: Path, rank: int, steps: Steps) -> None:
    """Writes the file of a rank of the pipeline, whole. Raises WriteError."""
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    write_file(trace_file(run, rank), "".join(line(step, events) + "\n" for step, events in sorted(steps.items())))


def line(step: int, events: Sequence[Event]) -> str:
    slots = [["/".join(map(str, slot)), round(start, 7), round(end, 7)] for slot, start, end in events]
    return json.dumps({"step": step, "slots": slots}, separators=(",", ":"))


def read_trace(run: Path) -> dict[int, Timeline]:
    """The timelines of a run by step: of the steps that every rank has traced. Raises ConfigError."""
    ranks = sorted((run / FOLDER).glob("rank-*.jsonl"))
    if not ranks:
        raise ConfigError(
            f"{run}: has no trace of a pipeline; run it with strategy.pipeline_parallel and "
            "callbacks.pipeline_trace={every_n_steps: 10}"
        )
    expected = [trace_file(run, rank) for rank in range(len(ranks))]
    if missing := [path for path in expected if path not in ranks]:
        raise ConfigError(f"{missing[0]}: missing, so the trace has not every rank of the pipeline")
    found = [read_rank(path) for path in ranks]
    steps = sorted(set.intersection(*(set(each) for each in found)))
    if not steps:
        raise ConfigError(f"{run / FOLDER}: its files have no step in common")
    return {step: Timeline([list(each[step]) for each in found]) for step in steps}


def read_rank(path: Path) -> dict[int, list[Event]]:
    """The events of a rank by step. Raises ConfigError, which names the line that can't be read."""
    found = {}
    for number, text in enumerate(read_text(path).splitlines(), 1):
        try:
            content = json.loads(text)
            events = [Event(parse_slot(name), float(start), float(end)) for name, start, end in content["slots"]]
            if not events or any(event.end < event.start for event in events):
                raise ValueError("no slots, or one that ends before it starts")
            found[int(content["step"])] = events
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: line {number} is no traced step ({error})") from error
    return found


def parse_slot(name: str) -> Slot:
    """
    >>> parse_slot("0F12/7B3")
    (Action(kind='F', chunk=0, micro_batch=12), Action(kind='B', chunk=7, micro_batch=3))
    """
    parts = [ACTION.fullmatch(part) for part in name.split("/")]
    if not all(parts):
        raise ValueError(f"{name!r} is no action")
    return tuple(Action(part[2], int(part[1]), int(part[3])) for part in parts if part)


@dataclass(frozen=True)
class MeasuredTimes:
    """Seconds of slots, by what they do and in which chunks. Medians over micro-batches, and steps.

    A backward pass that was not measured whole takes its parts' time, and a part that was not measured alone half of
    the whole. Actions that were not measured together take their sum.
    """

    seconds: Mapping[tuple[tuple[str, int], ...], float]

    def __call__(self, slot: Slot) -> float:
        key = tuple((action.kind, action.chunk) for action in slot)
        if key in self.seconds:
            return self.seconds[key]
        return sum(self.of(action.kind, action.chunk) for action in slot)

    def of(self, kind: str, chunk: int) -> float:
        known = self.seconds.get(((kind, chunk),))
        if known is not None:
            return known
        if kind == "B":
            return self.seconds[("I", chunk),] + self.seconds[("W", chunk),]
        return self.seconds[("B", chunk),] / 2


def measured_times(timelines: Iterable[Timeline]) -> MeasuredTimes:
    found: dict[tuple[tuple[str, int], ...], list[float]] = {}
    for timeline in timelines:
        for events in timeline.ranks:
            for slot, start, end in events:
                key = tuple((action.kind, action.chunk) for action in slot)
                found.setdefault(key, []).append(end - start)
    return MeasuredTimes({key: median(values) for key, values in found.items()})


def simulated(timeline: Timeline, times: MeasuredTimes) -> Timeline:
    """What the ranks' lists of actions would take with these times, without transfers."""
    slots = [[event.slot for event in events] for events in timeline.ranks]
    chunks = 1 + max(action.chunk for mine in slots for slot in mine for action in slot)
    return simulate(slots, times, chunks)
