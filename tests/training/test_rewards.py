"""Reward functions in their process: what they are given, and how each failure is named."""

import re
import textwrap
import time

import pytest

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation.rewards import exact, repeats
from dsv3_lightning.training.rewards import RewardFailed, Rewards
from tests.conftest import ROOT

FUNCTIONS = """
    import os, sys, time
    def length(completions, answer, **others):
        print("a line on stdout is no answer")
        assert sorted(others) == ["completion_ids", "prompts"]
        return [None if text == "" else len(text) + bonus for text, bonus in zip(completions, answer)]
    def raises(completions, **others): raise KeyError("no such\\nthing")
    def hangs(completions, **others): time.sleep(600)
    def too_few(completions, **others): return [1.0]
    def too_many(completions, **others): return [1.0] * 4
    def nothing(completions, **others): return None
    def text(completions, **others): return ["good"] * len(completions)
    def infinite(completions, **others): return [float("nan")] * len(completions)
    def exits(completions, **others): sys.exit(3)
    def dies(completions, **others): os._exit(7)
"""
ASKED = {"prompts": ["a", "b"], "completions": ["xyz", ""], "completion_ids": [[1], []], "answer": [0.5, 0]}


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "judges.py").write_text(textwrap.dedent(FUNCTIONS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_a_function_gets_trls_arguments_and_every_column_and_may_return_none(functions):
    rewards = Rewards(["judges:length"], 30)
    try:
        for _ in range(2):  # of the same process
            ((first, second),) = rewards(ASKED, 2)
            assert first == 3.5 and second != second
    finally:
        rewards.close()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("raises", "KeyError: 'no such\\nthing'"),
        ("too_few", "returned 1 rewards for 2 answers"),
        ("too_many", "returned 4 rewards for 2 answers"),
        ("nothing", "TypeError"),
        ("text", "ValueError: could not convert string to float: 'good'"),
        ("infinite", "returned a reward that is not a finite number"),
        ("exits", "SystemExit: 3"),
        ("dies", "ended its process (exit status 7)"),
    ],
)
def test_what_goes_wrong_is_one_line_that_names_the_function(functions, name, why):
    rewards = Rewards(["judges:length", f"judges:{name}"], 30)
    with pytest.raises(RewardFailed) as failure:
        rewards(ASKED, 2)
    assert str(failure.value).startswith(f"grpo.rewards=judges:{name}: ") and why in str(failure.value)
    assert "\n" not in str(failure.value)
    assert rewards.process is None


@pytest.mark.slow
def test_a_function_that_hangs_is_ended_with_its_process_and_its_limit_is_named(functions):
    rewards = Rewards(["judges:hangs"], 1.5, ("--reward", "--reward-seconds"))
    rewards.check()
    process = rewards.process
    begun = time.monotonic()
    with pytest.raises(RewardFailed, match=r"--reward=judges:hangs: took longer than 1.5 s \(--reward-seconds\)"):
        rewards(ASKED, 2)
    assert process.returncode is not None and time.monotonic() - begun < 60


@pytest.mark.parametrize("name", ["judges:absent", "nowhere:absent"])
def test_a_function_that_is_not_there_is_found_before_the_run(functions, name):
    with pytest.raises(ConfigError, match=f"grpo.rewards={name}: (AttributeError|ModuleNotFoundError): "):
        Rewards([name], 30).check()


def test_an_empty_or_half_right_text_is_not_the_exact_answer():
    texts = ["", " ", "42", " 42 \n", "42 or 43", "142", [{"role": "assistant", "content": "42"}]]
    found = exact(completions=texts, answer=["", "42", "42", "42", "42", "42", "42"], prompts=[], completion_ids=[])
    assert found == [0, 0, 1, 1, 0, 0, 1]


def test_the_function_on_the_page_rewards_the_right_answer():
    page = (ROOT / "docs/reinforce.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, space := {})
    assert space["correct"](completions=["4 ", "5", ""], answer=["4", "4", "4"], prompts=[]) == [1.0, 0.0, 0.0]


def test_repetition_costs_more_the_longer_it_goes_on():
    none, some, loop = repeats(completions=[], completion_ids=[[1, 2, 3, 4], [1, 2, 1, 2, 3], [1, 2] * 50])
    assert none == 0 and -1 < loop < some < 0
    assert repeats(completions=[], completion_ids=[[5], []]) == [0, 0]
