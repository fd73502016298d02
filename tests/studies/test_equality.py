"""Two runs are equal to the bit, or the first step that differs is named."""

import math
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from dsv3_lightning.cli import main


def run(folder: Path, **curves: dict[int, float]) -> str:
    with SummaryWriter(str(folder)) as writer:
        for tag, values in curves.items():
            for step, value in values.items():
                writer.add_scalar(tag.replace("__", "/"), value, step)
    return str(folder)


BASE = {"loss__main": {1: 3.0, 2: 2.0, 3: math.nan}, "throughput__mfu": {1: 0.5}}


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"throughput__mfu": {1: 0.7}}, 0, "equal to the bit: 1 curves with 3 points"),
        ({"loss__main": {1: 3.0, 2: 2.0 + 2**-20, 3: 1.0}}, 1, "step 2: loss/main is 2.0 and 2.00000095367"),
        ({"loss__main": {1: 3.0, 2: 2.0}}, 1, "step 3: loss/main is nan and missing"),
        ({"val__loss": {2: 1.0}}, 1, "step 2: val/loss is missing and 1.0"),
    ],
)
def test_the_first_step_that_differs_is_named(changes: dict, code: int, said: str, tmp_path: Path, capsys):
    one, other = run(tmp_path / "a", **BASE), run(tmp_path / "b", **BASE | changes)
    assert main(["compare", one, other, "--equal"]) == code
    assert capsys.readouterr().out.startswith(said)


def test_what_is_no_pair_of_runs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = run(tmp_path / "a", **BASE)
    assert main(["compare", one, "--equal"]) == 2
    assert "compares two runs, 1 are given" in capsys.readouterr().err
    assert main(["compare", one, str(tmp_path / "none"), "--equal"]) == 2
    assert "none: holds no event files of a run" in capsys.readouterr().err
