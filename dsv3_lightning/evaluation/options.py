"""Ranked options: the continuation that a model finds most likely, by several measures (DeepSeek LLM, §5.1)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation.requests import Pair, context_text, fit, pair_ids
from dsv3_lightning.evaluation.statistics import Estimate, centered, estimate
from dsv3_lightning.evaluation.tasks import Sample, Task
from dsv3_lightning.inference.scoring import Scored

Score = Callable[[Sequence[tuple[list[int], list[int]]]], list[Scored]]
Answer = dict[str, Any]

MEASURES = ("raw", "per_byte", "per_character", "per_token", "unconditional")


def rank_options(
    task: Task, samples: Sequence[Sample], tokenizer: Tokenizer, score: Score, limit: int, seed: int
) -> list[Answer]:
    """A record of each question: its options' log-probabilities in nats, and which one each measure chooses.

    limit: tokens of the model's context. Raises ConfigError for an option that it can't hold.
    """
    pairs: list[Pair] = []
    for sample in samples:
        options = range(len(sample.continuations))
        contexts = [context_text(task, sample.before(option), seed) for option in options]
        bare = task.settings.unconditional if sample.unconditional is None else sample.unconditional
        for texts in (contexts, [bare for _ in options]):
            for before, option in zip(texts, sample.continuations, strict=True):
                pairs.append(fit(pair_ids(tokenizer, before, option), limit))
                if len(pairs[-1].continuation) > limit:
                    raise ConfigError(
                        f"task {task.name}: line {sample.number}: an option has more tokens than the context, {limit}"
                    )
    scored = iter(score([(pair.context, pair.continuation) for pair in pairs]))
    rest = iter(pairs)
    answers = []
    for sample in samples:
        K = len(sample.continuations)
        cut = any([next(rest).cut for _ in range(2 * K)][:K])
        given, unconditional = [next(scored) for _ in range(K)], [next(scored) for _ in range(K)]
        answers.append(record(sample, given, unconditional, cut, context_text(task, sample, seed)))
    return answers


def record(sample: Sample, given: list[Scored], bare: list[Scored], cut: bool, context: str) -> Answer:
    log_p = [one.total for one in given]
    unconditional = [one.total for one in bare]
    texts = sample.continuations
    scores = {
        "raw": log_p,
        "per_byte": [value / len(text.encode()) for value, text in zip(log_p, texts)],
        "per_character": [value / len(text) for value, text in zip(log_p, texts)],
        "per_token": [value / len(one.log_p_C) for value, one in zip(log_p, given)],
        "unconditional": [value - base for value, base in zip(log_p, unconditional)],
    }
    return {
        "line": sample.number,
        "context": context,
        "cut": cut,
        "label": sample.label,
        "bits_per_byte": bits_per_byte(log_p[sample.label], texts[sample.label]),
        "chosen": {measure: best_places(scores[measure]) for measure in MEASURES},
        "options": [
            {"text": text, "log_p": log_p[i], "log_p_unconditional": unconditional[i], "tokens": len(given[i].log_p_C),
             "greedy": given[i].greedy} | ({"context": sample.contexts[i]} if sample.contexts else {})
            for i, text in enumerate(texts)
        ],
    }  # fmt: skip


def bits_per_byte(log_p: float, text: str) -> float:
    """The bits that a text takes, by its log-probability in nats, per byte of UTF-8."""
    return -log_p / math.log(2) / len(text.encode())


def best_places(scores: Sequence[float]) -> list[int]:
    """The places of the highest score; none where one isn't a number."""
    if any(math.isnan(score) for score in scores):
        return []
    return [place for place, score in enumerate(scores) if score == max(scores)]


def option_metrics(answers: Sequence[Answer]) -> dict[str, Estimate]:
    """The means over questions. Options with the same score share the credit, as if one of them were drawn."""
    metrics = {"gold_bits_per_byte": estimate([answer["bits_per_byte"] for answer in answers])}
    chance = estimate([1 / len(answer["options"]) for answer in answers]).value
    for measure in MEASURES:
        chosen = [answer["chosen"][measure] for answer in answers]
        right = [(answer["label"] in places) / max(len(places), 1) for answer, places in zip(answers, chosen)]
        metrics[f"accuracy_{measure}"] = estimate(right)
        metrics[f"centered_{measure}"] = centered(metrics[f"accuracy_{measure}"], chance)
    metrics["chance"] = Estimate(chance, 0.0)
    return metrics
