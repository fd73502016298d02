"""`dsv3 evaluate`: scores a model on tasks, and keeps every answer."""

import argparse
from pathlib import Path

from dsv3_lightning.common.files import make_folder, write_file
from dsv3_lightning.common.flags import model_argument, not_negative, positive, seed
from dsv3_lightning.common.paths import display_path, path_argument
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.evaluation.protocols import PROTOCOLS
from dsv3_lightning.evaluation.tasks import find_tasks

FOLDER = "eval"  # where `dsv3 eval fetch` puts tasks


def arguments(parser: argparse.ArgumentParser) -> None:
    model_argument(parser)
    add = parser.add_argument
    help = "jsonl files, or names of files in the tasks folder"
    add("--tasks", nargs="+", required=True, metavar="TASK", help=help)
    help = "the folder of `dsv3 eval fetch`; default %(default)s"
    add("--folder", type=path_argument, default=FOLDER, metavar="FOLDER", help=help)
    help = f"how answers are generated: {', '.join(PROTOCOLS)}; default: the task's"
    add("--protocol", choices=PROTOCOLS, metavar="NAME", help=help)
    add("--repeats", type=positive, metavar="K", help="answers to each question; default: the protocol's")
    add("--shots", type=not_negative, metavar="N", help="few-shot examples; default: the task's")
    add("--max-new-tokens", type=positive, metavar="N", help="tokens of an answer; default: the task's or protocol's")
    add("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    add("--seed", type=seed, default=1, metavar="N", help="of examples and sampling; default %(default)s")
    help = "where results and answers go; default: evaluation/ in the run's folder, or evaluation/ here"
    add("--out", type=path_argument, metavar="FOLDER", help=help)


def run(
    checkpoint: Path,
    tasks: list[str],
    folder: Path,
    protocol: str | None,
    repeats: int | None,
    shots: int | None,
    max_new_tokens: int | None,
    limit: int | None,
    seed: int,
    out: Path | None,
) -> int:
    """Prints a table; writes results.json, and all answers to a jsonl file for each task."""
    found = find_tasks(tasks, folder, protocol=protocol, shots=shots, max_new_tokens=max_new_tokens)
    if out is None:
        inside = next((one for one in (checkpoint, checkpoint.parent.parent) if (one / "config.yaml").is_file()), None)
        out = Path("evaluation").absolute() if inside is None else inside / "evaluation"
    make_folder("--out", out)
    from functools import partial

    from dsv3_lightning.evaluation.evaluate import evaluate, results_table, write_answers
    from dsv3_lightning.evaluation.writers import cached_writer
    from dsv3_lightning.inference.scoring import score
    from dsv3_lightning.runs.models import load

    model, tokenizer = load(checkpoint, chat=any(task.settings.chat for task in found))
    context = model.config.max_position_embeddings
    writer, scorer = cached_writer(model, tokenizer, seed), partial(score, model)
    results = []
    for task in found:
        result = evaluate(task, tokenizer, scorer, writer, context, seed, limit, repeats)
        write_answers(out / "answers", result)
        results.append(result)
        if cut := sum(answer["cut"] for answer in result.answers):
            print(f"{task.name}: {cut} of {len(result.answers)} prompts lost their start, longer than {context} tokens")
    content = {"model": str(checkpoint), "seed": seed, "tasks": {one.task.name: one.summary() for one in results}}
    write_file(out / "results.json", strict_json(content, indent=1) + "\n")
    print(results_table(results))
    print(f"{display_path(out)}: results.json and answers/")
    return 0
