"""Tasks that reasoning-gym generates, the same for the same seed. Imports no torch."""

import json

from dsv3_lightning.common.wording import nearest
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation.numerals import read_number


def generated_task(name: str, count: int, seed: int) -> str:
    """The text of a task's file with `count` questions of a generator. Raises ConfigError.

    Answers that are all numbers are compared as numbers, others as texts.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError("eval generate: needs reasoning-gym; pip install 'dsv3-lightning[tasks]'") from error
    if name not in DATASETS:
        raise ConfigError(f"eval generate {name}: no such generator{nearest(name, DATASETS)}")
    questions = list(reasoning_gym.create_dataset(name, size=count, seed=seed))
    answers = [str(one["answer"]) for one in questions]
    checker = "number" if all(read_number(answer) is not None for answer in answers) else "text"
    first = {"task": name, "checker": checker, "max_new_tokens": 64, "license": "Apache-2.0"}
    lines = [
        {"prompt": f"{one['question'].rstrip()}\nAnswer:", "answer": answer}
        for one, answer in zip(questions, answers, strict=True)
        if answer.strip()
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (first, *lines))
