"""How long a sequence one rank can hold. Sequences aren't split over ranks here, so this is the longest context."""

from collections.abc import Callable

LONG = (32768, 131072)  # the report's two extensions (V3 §4.3)
UNIT = 1024


def longest(needed: Callable[[int], float], memory: float) -> int:
    """The longest sequence, a multiple of 1,024, of which one sample fits into these bytes; 0 if none does.

    needed: bytes of a rank with one sample of a length per micro-batch, which grow with the length.
    """
    low, high = 0, UNIT
    while needed(high) <= memory and high < 2**30:
        low, high = high, 2 * high
    while high - low > UNIT:
        middle = (low + high) // 2 // UNIT * UNIT
        low, high = (middle, high) if needed(middle) <= memory else (low, middle)
    return low
