"""Questions as token ids: few-shot examples, the split between context and continuation, and what is cut."""

from collections.abc import Sequence
from typing import NamedTuple

from dsv3_lightning.data.text.conversation import conversation, turn_ids
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.evaluation.tasks import Sample, Task
from dsv3_lightning.inference.text import encode

BETWEEN = "\n\n"  # between few-shot examples


class Pair(NamedTuple):
    """Token ids of a context, begin token included, and of its continuation. cut: if the context lost its start."""

    context: list[int]
    continuation: list[int]
    cut: bool = False


def joined(context: str, text: str) -> str:
    """A context with its answer, with one space between them unless there is some already."""
    return context + gap(context, text) + text


def gap(context: str, text: str) -> str:
    return " " if context and text and not context[-1].isspace() and not text[0].isspace() else ""


def context_text(task: Task, sample: Sample, seed: int) -> str:
    """The text before the answer: examples with their answers, then the question."""
    shots = task.shots_of(sample, seed)
    if task.kind == "options":
        return BETWEEN.join([*(shot.context + shot.gold for shot in shots), sample.context])
    return BETWEEN.join([*(joined(shot.context, shot.gold) for shot in shots), sample.context])


def pair_ids(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Both parts of a text that is tokenized as a whole; the context's trailing spaces belong to the continuation.

    A token that spans both belongs to the part where lm-evaluation-harness counts it: the first tokens, as many as the
    context alone has, are the context.
    """
    stripped = context.rstrip()
    ids = encode(tokenizer, context + continuation)
    count = len(encode(tokenizer, stripped))
    return Pair([tokenizer.bos_id, *ids[:count]], ids[count:])


def prompt_of(task: Task, sample: Sample, tokenizer: Tokenizer, seed: int) -> list[int]:
    """Token ids before a generated answer: a text, or turns of a conversation."""
    if not task.settings.chat:
        return [tokenizer.bos_id, *encode(tokenizer, context_text(task, sample, seed))]
    turns: list[tuple[str, str]] = []
    for shot in task.shots_of(sample, seed):
        turns += [("user", shot.context), ("assistant", shot.gold)]
    turns.append(("user", sample.context))
    written = conversation(tokenizer, ((role, encode(tokenizer, text)) for role, text in turns))
    return [*written.ids, turn_ids(tokenizer)[1]]


def fit(pair: Pair, limit: int) -> Pair:
    """The pair with as much of the end of its context as the model's context holds, after the begin token."""
    room = limit + 1 - len(pair.continuation)
    if len(pair.context) <= room:
        return pair
    context = [pair.context[0], *pair.context[len(pair.context) - room + 1 :]]
    return Pair(context[: max(room, 1)], pair.continuation, True)


def fit_prompt(prompt: Sequence[int], limit: int, new: int) -> tuple[list[int], bool]:
    """A prompt that leaves room for `new` tokens, or for half of the context where that is less; whether it was cut."""
    room = max(1, limit - min(new, limit // 2))
    return (list(prompt), False) if len(prompt) <= room else ([prompt[0], *prompt[len(prompt) - room + 1 :]], True)
