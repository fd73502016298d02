"""Evaluation of a model on tasks, and how results are shown."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.common.table import table
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.evaluation.generation import Write, answer_questions, generation_metrics, protocol_for
from dsv3_lightning.evaluation.options import Answer, Score, option_metrics, rank_options
from dsv3_lightning.evaluation.statistics import Estimate
from dsv3_lightning.evaluation.tasks import Task

FIRST = "gold_bits_per_byte"  # the metric that moves for small models


@dataclass(frozen=True)
class Result:
    """A task's metrics by name, the first one first, and a record of each question."""

    task: Task
    metrics: dict[str, Estimate]
    answers: list[Answer]

    def summary(self) -> dict[str, Any]:
        """The part of a result that results.json holds."""
        return {
            "samples": len(self.answers),
            "settings": asdict(self.task.settings),
            "sha256": self.task.sha256,
            "cut": sum(answer["cut"] for answer in self.answers),
            "metrics": {name: one._asdict() for name, one in self.metrics.items()},
        }


def evaluate(
    task: Task,
    tokenizer: Tokenizer,
    score: Score,
    write: Write,
    context: int,
    seed: int = 1,
    limit: int | None = None,
    repeats: int | None = None,
) -> Result:
    """The result of a task. context: the model's limit of tokens. limit: the first questions alone. Raises ConfigError.

    Examples and random numbers depend on the seed and a question's line alone, so a limit changes no answer.
    """
    samples = task.samples[:limit]
    if task.kind == "options":
        answers = rank_options(task, samples, tokenizer, score, context, seed)
        return Result(task, option_metrics(answers), answers)
    protocol = protocol_for(task, repeats)
    answers = answer_questions(task, samples, tokenizer, write, score, context, seed, protocol)
    return Result(task, generation_metrics(answers), answers)


def write_answers(folder: Path, result: Result) -> None:
    """Writes a record of each question to <task>.jsonl. Raises WriteError."""
    lines = (strict_json(answer, ensure_ascii=False) + "\n" for answer in result.answers)
    write_file(folder / f"{result.task.name}.jsonl", "".join(lines))


def results_table(results: Sequence[Result]) -> str:
    """A table for each kind of task: means with their standard errors."""
    parts = []
    for kind, columns in (("options", OPTION_COLUMNS), ("generation", GENERATION_COLUMNS)):
        some = [(result, with_most(result)) for result in results if result.task.kind == kind]
        if some:
            shown = {title: name for title, name in columns.items() if any(name in metrics for _, metrics in some)}
            rows = [
                [result.task.name, count(result), *(cell(metrics.get(name), name) for name in shown.values())]
                for result, metrics in some
            ]
            parts.append(table([["task", "n", *shown], *rows]))
    return "\n\n".join(parts)


OPTION_COLUMNS = {
    "gold bits per byte": FIRST,
    "accuracy": "accuracy_raw",
    "per byte": "accuracy_per_byte",
    "per token": "accuracy_per_token",
    "unconditional": "accuracy_unconditional",
    "centered": "centered_per_byte",
}
GENERATION_COLUMNS = {
    "gold bits per byte": FIRST,
    "pass@1": "pass@1",
    "pass@k": "pass@k",
    "majority": "majority",
    "F1": "f1",
    "wrong": "wrong",
    "unreadable": "unreadable",
    "never ended": "never_ended",
    "spread of runs": "spread_of_runs",
}


def with_most(result: Result) -> dict[str, Estimate]:
    """The metrics, with pass@k and majority@k of the largest k also as `pass@k` and `majority`."""
    more = {}
    for name, prefix in {"pass@k": "pass@", "majority": "majority@"}.items():
        found = [one for one in result.metrics if one.startswith(prefix) and one != "pass@1"]
        if found:
            more[name] = result.metrics[found[-1]]
    return result.metrics | more


def count(result: Result) -> str:
    repeats = len(result.answers[0]["answers"]) if result.task.kind == "generation" else 1
    return f"{len(result.answers):,}" + (f" x {repeats}" if repeats > 1 else "")


def cell(one: Estimate | None, name: str) -> str:
    if one is None or math.isnan(one.value):
        return "-"
    value, error = (
        (f"{one.value:.3f}", f"{one.error:.3f}") if name == FIRST else (f"{one.value:.1%}", f"{one.error:.1%}")
    )
    return value if math.isnan(one.error) or name == "spread_of_runs" else f"{value} ± {error}"
