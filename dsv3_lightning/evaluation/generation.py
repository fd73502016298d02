"""Generated answers: several to each question, cut where they end, checked, and counted."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.evaluation.answers import Tally, check_all, final_answers, vote
from dsv3_lightning.evaluation.options import Answer, Score, bits_per_byte
from dsv3_lightning.evaluation.protocols import Protocol, protocol_of
from dsv3_lightning.evaluation.requests import Pair, context_text, fit, fit_prompt, gap, pair_ids, prompt_of
from dsv3_lightning.evaluation.statistics import Estimate, estimate, majority, pass_at, powers_to
from dsv3_lightning.evaluation.tasks import Sample, Task
from dsv3_lightning.evaluation.words import best_common_words
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.text import encode

PER_QUESTION = 1 << 32  # numbers of random streams: question · PER_QUESTION + answer


class Generated(NamedTuple):
    """A generated text, without end token and stop text. ended: False where the limit of tokens cut it off."""

    text: str
    ended: bool
    tokens: int


class Request(NamedTuple):
    """A text to generate. number: that of its random stream."""

    prompt: list[int]
    number: int
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


Write = Callable[[Sequence[Request]], list[Generated]]


def protocol_for(task: Task, repeats: int | None) -> Protocol:
    """The task's protocol with its own limits."""
    protocol = protocol_of(task.settings.protocol)
    if task.settings.max_new_tokens:
        protocol = protocol._replace(max_new_tokens=task.settings.max_new_tokens)
    return protocol if repeats is None else protocol._replace(repeats=repeats)


def answer_questions(
    task: Task,
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    write: Write,
    score: Score,
    limit: int,
    seed: int,
    protocol: Protocol,
) -> list[Answer]:
    """A record of each question: its answers with their verdicts, and the bits per byte of the expected text.

    limit: tokens of the model's context, which holds the prompt's end and the answer.
    """
    sampling = Sampling(protocol.temperature, top_p=protocol.top_p)
    new = min(protocol.max_new_tokens, limit)
    prompts = [fit_prompt(prompt_of(task, sample, tokenizer, seed), limit, new) for sample in samples]
    requests = [
        Request(prompt, sample.number * PER_QUESTION + repeat, new, sampling, task.settings.stop)
        for sample, (prompt, _) in zip(samples, prompts)
        for repeat in range(protocol.repeats)
    ]
    texts = iter(write(requests))
    bits = gold_bits(task, samples, tokenizer, score, limit, seed)
    answers, in_words = [], task.settings.checker == "words"
    for sample, (_, cut), gold in zip(samples, prompts, bits):
        generated = [next(texts) for _ in range(protocol.repeats)]
        verdicts = check_all(task.settings.checker, [one.text for one in generated], [sample.answers] * len(generated))
        answers.append(
            {
                "line": sample.number,
                "prompt": context_text(task, sample, seed),
                "cut": cut,
                "expected": list(sample.answers),
                "bits_per_byte": gold,
                "answers": [
                    {
                        "text": one.text,
                        "verdict": verdict,
                        **({"f1": best_common_words(final_answers(one.text), sample.answers)} if in_words else {}),
                        "vote": vote(task.settings.checker, one.text),
                        "ended": one.ended,
                        "tokens": one.tokens,
                    }
                    for one, verdict in zip(generated, verdicts, strict=True)
                ],
            }  # fmt: skip
        )
    assert next(texts, None) is None, "one verdict for every answer"
    return answers


def gold_bits(
    task: Task, samples: Sequence[Sample], tokenizer: Tokenizer, score: Score, limit: int, seed: int
) -> list[float | None]:
    """Bits per byte of each expected text after its question; None for one that the context can't hold."""
    wanted: list[tuple[int, str]] = []
    pairs = []
    for place, sample in enumerate(samples):
        context = context_text(task, sample, seed)
        text = gap(context, sample.gold) + sample.gold
        pair = pair_ids(tokenizer, context, text)
        if task.settings.chat:
            pair = Pair(prompt_of(task, sample, tokenizer, seed), encode(tokenizer, sample.gold))
            text = sample.gold
        if len(pair.continuation) <= limit:
            wanted.append((place, text))
            pairs.append(fit(pair, limit))
    bits: list[float | None] = [None] * len(samples)
    for (place, text), scored in zip(wanted, score([(pair.context, pair.continuation) for pair in pairs]), strict=True):
        bits[place] = bits_per_byte(scored.total, text)
    return bits


def generation_metrics(answers: Sequence[Answer]) -> dict[str, Estimate]:
    """The means over questions; of the bits per byte alone where nothing was generated.

    pass@1 is the share of right answers; spread is the standard deviation of the accuracy between the runs.
    """
    known = [answer["bits_per_byte"] for answer in answers if answer["bits_per_byte"] is not None]
    metrics = {"gold_bits_per_byte": estimate(known)}
    rows: list[list[dict[str, Any]]] = [answer["answers"] for answer in answers]
    if not rows[0]:
        return metrics
    right = [[one["verdict"] == "right" for one in row] for row in rows]
    repeats = len(rows[0])
    for k in powers_to(repeats):
        metrics[f"pass@{k}"] = estimate([pass_at(k, len(row), sum(row)) for row in right])
    if repeats > 1:
        votes = [[one["vote"] for one in row] for row in rows]
        metrics[f"majority@{repeats}"] = estimate([majority(*both) for both in zip(votes, right)])
        runs = [sum(row[run] for row in right) / len(right) for run in range(repeats)]
        metrics["spread_of_runs"] = Estimate(statistics.stdev(runs), 0.0)
    tallies = [Tally.of(one["verdict"] for one in row) for row in rows]
    for verdict in ("right", "wrong", "unreadable"):
        metrics[verdict] = estimate([getattr(tally, verdict) / tally.total for tally in tallies])
    if "f1" in rows[0][0]:
        metrics["f1"] = estimate([statistics.fmean(one["f1"] for one in row) for row in rows])
    metrics["never_ended"] = estimate([sum(not one["ended"] for one in row) / len(row) for row in rows])
    return metrics
