"""A rank's part of the answers that a step of GRPO learns from, and the messages about their rewards."""

import json
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from dsv3_lightning.data.tuning.lines import Lines
from dsv3_lightning.inference.rollout import Sampled


class Group(NamedTuple):
    """A prompt's answers. number: of the prompt in the run. sample: in the data. ended: whether an end token came.

    rewards: [functions, answers], NaN where a function does not apply. advantages: [answers], NaN for one without any.
    sampled: log-probabilities that each answer's tokens were drawn with. old, reference: those by a training pass
    of the model that sampled them, and by the reference; None where this step's pass or nothing takes their place.
    routes: as in Sampled.
    """

    number: int
    sample: int
    answers: list[list[int]]
    ended: list[bool]
    rewards: np.ndarray
    advantages: np.ndarray
    sampled: list[np.ndarray] | None = None
    old: list[np.ndarray] | None = None
    reference: list[np.ndarray] | None = None
    routes: list[np.ndarray] | None = None


def packed(groups: list[Group]) -> str:
    """Groups as JSON, since a checkpoint holds no tensors but weights, and no code."""
    arrays = ("sampled", "old", "reference", "routes")
    fields = []
    for group in groups:
        lists: dict[str, Any] = {"rewards": group.rewards.tolist(), "advantages": group.advantages.tolist()}
        for name in arrays:
            rows = getattr(group, name)
            lists[name] = None if rows is None else [row.tolist() for row in rows]
        fields.append(group._asdict() | lists)
    return json.dumps(fields)


def unpacked(text: str) -> list[Group]:
    types = {"sampled": np.float32, "old": np.float32, "reference": np.float32, "routes": np.int16}
    groups = []
    for fields in json.loads(text):
        for name, dtype in types.items():
            rows = fields[name]
            fields[name] = None if rows is None else [np.array(row, dtype=dtype) for row in rows]
        fields["rewards"], fields["advantages"] = np.array(fields["rewards"]), np.array(fields["advantages"])
        groups.append(Group(**fields))
    return groups


def of_all_ranks(value: Any, ranks: int) -> list[Any]:
    """The value of each rank, on every rank; all must call it."""
    if ranks == 1:
        return [value]
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, value)
    return found


def arguments_of(
    lines: Lines, samples: list[int], sampled: list[Sampled], texts: list[list[str]]
) -> dict[str, list[Any]]:
    """What reward functions are called with, an entry per answer: TRL's names, and every further field of the lines.

    A completion is text after a prompt of text, and a list with the assistant's message after messages.
    """
    columns = {name: None for sample in samples for name in lines.columns[sample]}
    arguments: dict[str, list[Any]] = {"prompts": [], "completions": [], "completion_ids": []}
    arguments |= {name: [] for name in columns}
    for sample, answers, written in zip(samples, sampled, texts, strict=True):
        shown = lines.shown[sample]
        for ids, text in zip(answers.tokens, written, strict=True):
            arguments["prompts"].append(shown)
            arguments["completions"].append(
                text if isinstance(shown, str) else [{"role": "assistant", "content": text}]
            )
            arguments["completion_ids"].append(ids)
            for name in columns:
                arguments[name].append(lines.columns[sample].get(name))
    return arguments


def complaint(step: int, groups: float, alike: float, rewarded: float) -> str | None:
    """One line where no group of a step teaches anything; None otherwise.

    groups: of the step. alike: those whose answers have equal rewards. rewarded: answers with a reward other than 0.
    """
    if alike < groups:
        return None
    why = (
        "every reward is 0; begin with a model that is sometimes right, with easier prompts, or look at the function"
        if not rewarded
        else "each group's answers have equal rewards; the prompts are too easy or too hard, or the temperature too low"
    )
    return f"step {step}: its {groups:.0f} groups have no contrast, so the gradient of the rewards is 0: {why}"
