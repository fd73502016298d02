"""The examples do what they say."""

import runpy
from pathlib import Path

from tests.conftest import Nano

EXAMPLES = Path(__file__).parents[2] / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_example_is_tried():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"use_the_model", "balance_your_own_model", "use_a_run"}


def test_the_model_learns_its_one_sentence_by_heart():
    assert main_of("use_the_model")() == "the quick brown fox jumps over the lazy d"


def test_the_bias_balances_somebody_elses_mixture():
    without, balanced = main_of("balance_your_own_model")()
    assert without > 1.0 and balanced < without / 4


def test_a_run_is_loaded_from_python(nano: Nano):
    run = nano.run("example", "trainer.max_steps=2")
    text, counts = main_of("use_a_run")(str(run.folder))
    assert text and all(sum(row) % 4 == 0 and sum(row) > 0 for row in counts)  # 4 experts per token
