"""Timelines drawn in the terminal and as a figure, simulated and measured ones alike.

Capital letters and full colors are a rank's first chunk, small letters and light colors its others.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dsv3_lightning.planning.pipeline.actions import Slot
from dsv3_lightning.planning.pipeline.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IDLE, TOGETHER = ".", "&"
LEGEND = "F forward, B backward, I its input part, W its weight part, & F and B together, . idle; small: a later chunk"
COLORS = {"F": "#4878cf", "B": "#e08214", "I": "#e0a83a", "W": "#5aa469", TOGETHER: "#8e63b5"}
NAMES = {
    "F": "forward", "B": "backward", "I": "backward, input part", "W": "backward, weight part",
    TOGETHER: "forward and backward together",
}  # fmt: skip
MOST_LABELS = 1500  # numbers of micro-batches in a figure; more can't be read


def kind_of(slot: Slot) -> str:
    return TOGETHER if len(slot) > 1 else slot[0].kind


def first_chunks(timeline: Timeline) -> list[int]:
    """The first chunk of each rank."""
    return [min(action.chunk for event in events for action in event.slot) for events in timeline.ranks]


def lines(timeline: Timeline, width: int, span: float | None = None) -> list[str]:
    """A line of `width` letters for each rank: in each of as many equal intervals, what it does for the longest time.

    span: seconds of the whole width; None: those of the timeline.
    """
    cell = (span or timeline.span) / width
    found = []
    for events, first in zip(timeline.ranks, first_chunks(timeline), strict=True):
        shares: list[dict[str, float]] = [{} for _ in range(width)]
        for slot, start, end in events:
            kind = kind_of(slot)
            letter = kind if slot[0].chunk == first or kind == TOGETHER else kind.lower()
            begin, stop = start - timeline.start, end - timeline.start
            for i in range(min(width - 1, int(begin / cell)), min(width - 1, int(stop / cell)) + 1):
                covered = min(stop, (i + 1) * cell) - max(begin, i * cell)
                shares[i][letter] = shares[i].get(letter, 0.0) + max(0.0, covered)
        found.append("".join(letter_of(share, cell) for share in shares))
    return found


def letter_of(share: Mapping[str, float], cell: float) -> str:
    idle = cell - sum(share.values())
    letter = max(share, key=lambda name: share[name], default=IDLE)
    return letter if share and share[letter] >= idle else IDLE


def text(timeline: Timeline, width: int) -> str:
    """The timeline for a terminal of so many columns, with a legend."""
    label = len(f"rank {len(timeline.ranks) - 1} ")
    drawn = lines(timeline, max(20, width - label))
    return "\n".join([*(f"{f'rank {rank} ':<{label}}{line}" for rank, line in enumerate(drawn)), LEGEND])


def figure(panels: Mapping[str, Timeline]) -> "Figure":
    """A figure of timelines by title, one below the other, on the same axis of seconds."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = sum(len(timeline.ranks) for timeline in panels.values())
    size = (14, 1.3 * len(panels) + 0.32 * ranks + 0.5)
    made = Figure(figsize=size, dpi=150, layout="constrained")
    axes = made.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for each, (title, timeline) in zip(axes, panels.items(), strict=True):
        draw(each, title, timeline)
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(0, max(timeline.span for timeline in panels.values()))
    kinds = {kind_of(event.slot) for timeline in panels.values() for events in timeline.ranks for event in events}
    patches = [Patch(facecolor=COLORS[kind], label=NAMES[kind]) for kind in COLORS if kind in kinds]
    made.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize="small", frameon=False)
    return made


def draw(axes: "Axes", title: str, timeline: Timeline) -> None:
    count = sum(len(events) for events in timeline.ranks)
    for rank, (events, first) in enumerate(zip(timeline.ranks, first_chunks(timeline), strict=True)):
        for slot, start, end in events:
            color = lighter(COLORS[kind_of(slot)], 0.0 if slot[0].chunk == first else 0.5)
            axes.barh(rank, end - start, left=start - timeline.start, height=0.9, color=color,
                      edgecolor="white", linewidth=0.3 if count <= MOST_LABELS else 0)  # fmt: skip
            if count <= MOST_LABELS and (end - start) / timeline.span > 0.006:
                words = "/".join(str(action.micro_batch) for action in slot)
                axes.text((start + end) / 2 - timeline.start, rank, words, ha="center", va="center", fontsize=5)
    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_ylabel("rank")
    axes.set_yticks(range(len(timeline.ranks)))
    axes.set_ylim(len(timeline.ranks) - 0.4, -0.6)


def lighter(color: str, share: float) -> tuple[float, ...]:
    """A color mixed with so much white."""
    parts: Sequence[int] = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return tuple((part + share * (255 - part)) / 255 for part in parts)
