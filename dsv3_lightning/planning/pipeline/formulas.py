"""Published bubbles and activations of pipeline schedules, for the same model on the same number of ranks.

Sources: V3 table 2, arXiv 2401.10241 (ZB), arXiv 2104.04473 §2.2 and 2205.05198 §4.2 (interleaved), DualPipe's README
(DualPipeV). F and B are the seconds of the forward and the backward pass of a P-th of the model for one micro-batch, W
those of the backward pass's weight part, F&B those of a forward and a backward pass that run together. Bubbles are the
idle time of the rank that waits longest. They hold for equal chunks where the parts of a pass take equally long, and
where F&B is at least B.
"""

from typing import NamedTuple


class Formula(NamedTuple):
    """What is published of a schedule. bubble: seconds, as `words` have it.

    activations: on the fullest rank, in those of a P-th of the model for one micro-batch. parameters: in P-ths.
    """

    bubble: float
    activations: float
    parameters: int
    words: str


def formulas(ranks: int, F: float, B: float, W: float, pair: float, chunks: int = 2) -> dict[str, Formula]:
    """The formulas by the name of the schedule. pair: F&B. chunks: of a rank, where a schedule has several."""
    P, v = ranks, chunks
    return {
        "1F1B": Formula((P - 1) * (F + B), P, 1, "(P-1)(F+B)"),
        "interleaved 1F1B": Formula((P - 1) * (F + B) / v, P + (P - 1) / v, 1, f"(P-1)(F+B)/{v}"),
        "ZB1P": Formula((P - 1) * (F + B - 2 * W), P, 1, "(P-1)(F+B-2W)"),
        "ZB1P, interleaved": Formula((P - 1) * (F + B - 2 * W) / v, P, 1, f"(P-1)(F+B-2W)/{v}"),
        "ZB-V": Formula(0.0, P, 1, "0 from a rank's first to its last action"),
        "DualPipe": Formula((P / 2 - 1) * (pair + B - 3 * W), P + 1, 2, "(P/2-1)(F&B+B-3W)"),
        "DualPipeV": Formula((P - 1) * (pair + B - 3 * W) / 2, P + 0.5, 1, "(P-1)(F&B+B-3W)/2"),
    }


# The name of the formula of each of torch's schedules.
FORMULA_OF = {
    "1f1b": "1F1B",
    "interleaved_1f1b": "interleaved 1F1B",
    "interleaved_zero_bubble": "ZB1P, interleaved",
    "zbv": "ZB-V",
    "dualpipev": "DualPipeV",
}
