"""Reward functions for `grpo.rewards` and `dsv3 sample`, with TRL's calling convention. Imports no torch.

Each takes lists of equal length, of which it names those that it reads, and returns a number per answer.
"""

from typing import Any


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, which is a list with the assistant's message where the prompt is messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact(completions: list[Any], answer: list[str], **others: Any) -> list[float]:
    """1 where the text is the line's `answer`, without spaces around it, else 0. An empty text is never right."""
    pairs = zip(completions, answer, strict=True)
    return [float(bool(text := text_of(one).strip()) and text == str(right).strip()) for one, right in pairs]


def repeats(completions: list[Any], completion_ids: list[list[int]], **others: Any) -> list[float]:
    """Minus the share of token pairs that stand in the answer before: 0 without repetition, near -1 in a loop."""
    found = []
    for ids in completion_ids:
        pairs = list(zip(ids, ids[1:]))
        found.append(len(set(pairs)) / len(pairs) - 1 if pairs else 0.0)
    return found
