"""Decontamination: planted questions are found however they are spaced and spelled, and nothing else is lost."""

import json
import random
from pathlib import Path

import pytest

from dsv3_lightning.data.cleaning.contamination import Contamination, strings
from dsv3_lightning.data.cleaning.words import words_of
from dsv3_lightning.errors import ConfigError

SETS = {
    "arithmetic.jsonl": [
        {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
         "How many clips did she sell altogether?", "answer": "72"},
        {"question": "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?"},
    ],
    "choices.jsonl": [
        {"question": "Which of these colors absorbs the most light?", "choices": ["white", "black"]},  # 8 words
        {"question": "What is ice?", "choices": ["frozen water", "steam"]},  # too short to search for
    ],
    "chinese.jsonl": [{"question": "下列关于光合作用的说法中，哪一项能够正确地描述叶绿体在白天吸收二氧化碳的过程？"}],
}  # fmt: skip


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    for name, records in SETS.items():
        lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        (tmp_path / name).write_text(lines + "\n", encoding="utf-8")
    return [str(tmp_path / name) for name in SETS]


def questions() -> list[str]:
    return [record["question"] for records in SETS.values() for record in records]  # type: ignore[misc]


def test_planted_questions_are_found_in_any_case_and_spacing(sets: list[str]) -> None:
    contamination = Contamination.of_files(sets, 13, 24)
    assert contamination.items == 4 and contamination.too_short == 6
    rng = random.Random(0)
    words = [f"filler{number}" for number in range(200)]
    texts, planted = [], []
    for number in range(100):
        text = " ".join(rng.choices(words, k=80))
        question = [*questions()[:3], questions()[4]][number % 4]
        if number % 2:
            for change in (str.upper, lambda text: "\n  ".join(text.split()), lambda text: text.replace(",", " - ")):
                question = change(question) if rng.random() < 0.7 else question
            text = f"{text} {question}\n{text}"
        texts.append(text)
        planted.append(bool(number % 2))
    assert contamination.found(words_of(texts)).tolist() == planted


def test_a_text_that_only_resembles_a_question_stays(sets: list[str]) -> None:
    texts = [
        "Which of these colors absorbs the least light?",
        "What is ice?",
        "Natalia sold clips to 48 of her friends in May. How many clips did she sell altogether?",
        "下列关于光合作用的说法中，哪一项正确？",
    ]
    assert not Contamination.of_files(sets, 13, 24).found(words_of(texts)).any()


def test_instructions_that_many_items_share_are_no_questions(tmp_path: Path) -> None:
    instruction = "Answer the following multiple choice question with a single letter and nothing else, please:"
    path = tmp_path / "set.jsonl"
    rows = [{"prompt": f"{instruction} number {'one two three four five six seven'.replace('o', str(n))}?"}
            for n in range(20)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    contamination = Contamination.of_files([str(path)], 13, 24)
    assert contamination.found(words_of([instruction, rows[3]["prompt"]])).tolist() == [False, True]


def test_every_text_of_a_record_is_searched_for() -> None:
    assert list(strings({"a": ["b", {"c": "d"}], "e": 1, "f": None})) == ["b", "d"]


def test_sets_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data.cleaning.decontaminate: .*bad.jsonl, line 2: not JSON"):
        Contamination.of_files([str(tmp_path / "bad.jsonl")], 13, 24)
    with pytest.raises(ConfigError, match=r"nope.jsonl: No such file"):
        Contamination.of_files([str(tmp_path / "nope.jsonl")], 13, 24)
