"""`dsv3 sample`: samples answers, keeps those that reward functions find right, and writes them as tuning data."""

import argparse
import json
from pathlib import Path
from typing import Any

from dsv3_lightning.common.flags import above_zero, model_argument, positive
from dsv3_lightning.common.flags import seed as seed_flag
from dsv3_lightning.common.paths import display_path, path_argument


def arguments(parser: argparse.ArgumentParser) -> None:
    model_argument(parser)
    parser.add_argument("prompts", type=path_argument, help="a .jsonl file, as for grpo (docs/reinforce.md)")
    parser.add_argument("out", type=path_argument, metavar="OUT", help="the .jsonl file to write")
    parser.add_argument(
        "--reward", action="append", required=True, metavar="MODULE:FUNCTION", help="may be repeated; rewards are added"
    )
    parser.add_argument("--threshold", type=float, default=1.0, help="the least reward of a right answer; default 1")
    parser.add_argument(
        "--samples", type=positive, default=8, metavar="N", help="answers per prompt; default %(default)s"
    )
    parser.add_argument(
        "--keep", type=positive, default=1, metavar="N", help="right answers kept per prompt; default 1"
    )
    parser.add_argument("--temperature", type=above_zero, default=1.0, help="default %(default)s")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=seed_flag, default=1, help="default %(default)s")
    parser.add_argument(
        "--reward-seconds", type=above_zero, default=60.0, metavar="S", help="limit of a call; default 60"
    )
    help = "write pairs for dpo: a right answer, or the line's own, and the worst sample that isn't right"
    parser.add_argument("--pairs", action="store_true", help=help)


def run(
    checkpoint: Path, prompts: Path, out: Path, reward: list[str], threshold: float, samples: int, keep: int,
    temperature: float, max_new_tokens: int, seed: int, reward_seconds: float, pairs: bool,
) -> int:  # fmt: skip
    """Writes OUT whole or not at all, and prints the share of right answers."""
    from dsv3_lightning.common.files import write_file
    from dsv3_lightning.data.tuning.lines import read_file
    from dsv3_lightning.inference.rollout import Key, sample_answers
    from dsv3_lightning.runs.models import load
    from dsv3_lightning.training.rewards import Rewards
    from dsv3_lightning.training.rollouts import arguments_of

    rewards = Rewards(reward, reward_seconds, ("--reward", "--reward-seconds"))
    try:
        rewards.check()
        model, tokenizer = load(checkpoint)
        lines = read_file(prompts, tokenizer)
        keys = [Key(seed, 0, number) for number in range(len(lines.shown))]
        ids = [lines.parts(number)[0].tolist() for number in range(len(lines.shown))]
        sampled = sample_answers(model, ids, keys, samples, max_new_tokens, temperature, tokenizer.end_ids)
        texts = [
            [tokenizer.decode(tokens[:-1] if ended else tokens) for tokens, ended in zip(one.tokens, one.ended)]
            for one in sampled
        ]
        given = arguments_of(lines, list(range(len(texts))), sampled, texts)
        found = rewards(given, sum(map(len, texts)))
    finally:
        rewards.close()
    totals = [sum(value for value in values if value == value) for values in zip(*found)]
    kept: list[dict[str, Any]] = []
    for number, (written, one) in enumerate(zip(texts, sampled)):
        own = totals[number * samples : (number + 1) * samples]
        answers = sorted(zip(own, written, one.ended), key=lambda answer: -answer[0])
        line = {"shown": lines.shown[number], "answer": lines.columns[number].get("answer")}
        kept += pair_of(line, answers, threshold) if pairs else right_ones(line, answers, threshold, keep)
    write_file(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    right = sum(total >= threshold for total in totals)
    what = "pairs" if pairs else "conversations"
    share = f"{right:,} of {len(totals):,} answers right ({right / len(totals):.1%})"
    print(f"{display_path(out)}: {len(kept):,} {what}; {share}")
    return 0


def right_ones(
    line: dict[str, Any], answers: list[tuple[float, str, bool]], threshold: float, keep: int
) -> list[dict[str, Any]]:
    """Up to `keep` different answers that are right and ended by themselves, as lines for tuning."""
    texts = list(dict.fromkeys(text for total, text, ended in answers if total >= threshold and ended))[:keep]
    if isinstance(line["shown"], str):
        return [{"text": line["shown"] + text} for text in texts]
    return [{"messages": [*line["shown"], {"role": "assistant", "content": text}]} for text in texts]


def pair_of(line: dict[str, Any], answers: list[tuple[float, str, bool]], threshold: float) -> list[dict[str, Any]]:
    """A pair of a right answer, the line's own if it has one, and the worst sample, if that is not right."""
    best, worst = answers[0], answers[-1]
    chosen = (
        line["answer"] if isinstance(line["answer"], str) else best[1] if best[0] >= threshold and best[2] else None
    )
    if chosen is None or worst[0] >= threshold or worst[1] == chosen:
        return []
    key = "prompt" if isinstance(line["shown"], str) else "messages"
    return [{key: line["shown"], "chosen": chosen, "rejected": worst[1], "rejected_ends": worst[2]}]
