"""Sums of two numbers of two digits as data for every stage of `make assistant`. Imports no torch.

Digits of answers come in reverse, "37+48" and "580": each of them follows from two digits and a carry. The stages'
tokenizer is trained with data.pretokenization=llm, which joins no digits to numbers that have to be looked up.

python -m dsv3_lightning.data.text.sums FOLDER writes, of the 10,000 sums in a random order,
  text.jsonl     2,000 in texts, a few to a document: what the model is pre-trained on
  talks.jsonl    the next 1,000 as conversations, for tuning
  prompts.jsonl  the rest but 200, as questions with their `answer`, which rewards alone read
  task.jsonl     the last 200, for dsv3 evaluate
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.paths import display_path, user_path

Sum = tuple[str, str]
TOLD, TUNED, HELD_OUT, IN_A_TEXT = 2000, 1000, 200, 4


def sums(seed: int = 0) -> list[Sum]:
    """Every question with its answer, in a random order.

    >>> dict(sums())["37+48"]
    '580'
    """
    found = [(f"{a:02}+{b:02}", f"{a + b:03}"[::-1]) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(found)
    return found


def write(folder: Path) -> dict[str, int]:
    """Writes the four files; returns their numbers of lines."""
    found = sums()
    told, tuned = found[:TOLD], found[TOLD : TOLD + TUNED]
    asked, held_out = found[TOLD + TUNED : -HELD_OUT], found[-HELD_OUT:]
    texts = [
        {"text": "".join(f"{question}={answer}\n" for question, answer in told[first : first + IN_A_TEXT])}
        for first in range(0, TOLD, IN_A_TEXT)
    ]
    user = [[{"role": "user", "content": question}] for question, _ in (*tuned, *asked)]
    talks = [{"messages": [*turn, {"role": "assistant", "content": answer}]} for turn, (_, answer) in zip(user, tuned)]
    prompts = [
        {"messages": turn, "answer": answer} for turn, (_, answer) in zip(user[len(tuned) :], asked, strict=True)
    ]
    settings = {"task": "sums", "chat": True, "max_new_tokens": 5}
    task: list[Any] = [settings, *({"prompt": question, "answer": answer} for question, answer in held_out)]
    files: dict[str, list[Any]] = {"text": texts, "talks": talks, "prompts": prompts, "task": task}
    for name, lines in files.items():
        write_file(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return {name: len(lines) for name, lines in files.items()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m dsv3_lightning.data.text.sums FOLDER")
    target = user_path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    counts = write(target)
    print(f"{display_path(target)}: " + ", ".join(f"{count:,} lines of {name}" for name, count in counts.items()))
