"""Random mutations of shipped configs: valid, or refused in one line. benchmarks/mutations.py makes 1,000 of each."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutations import LINE, config_mutants, try_mutants
from dsv3_lightning.config.compose import presets
from tests.conftest import ROOT

NAMES = [name for name in presets() if name != "base"]


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_config_is_valid_or_refused_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    counts, failures = try_mutants(name, 10, 3, tmp_path)
    assert not failures, failures[0]
    assert counts["refused"] > 2


def test_a_callback_whose_name_is_a_number_is_refused(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("defaults: [nano]\ncallbacks: {7: null}\n", encoding="utf-8")
    mutant = config_mutants("nano", random.Random(5))
    (tmp_path / "b.yaml").write_text(mutant()[1], encoding="utf-8")
    for file in ("a.yaml", "b.yaml"):  # as real processes
        done = subprocess.run(
            [sys.executable, "-m", "dsv3_lightning", "validate", file],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr
        assert (done.returncode == 0) == (not done.stderr)
        assert not done.stderr or LINE.fullmatch(done.stderr)
