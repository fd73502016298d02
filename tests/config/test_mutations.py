"""Random mutations of shipped configs are valid, or refused in one line. `benchmarks/mutations.py` tries many more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutations import try_mutants
from dsv3_lightning.config.compose import presets
from tests.conftest import ROOT

NAMES = [name for name in presets() if name not in ("base", "cleaning")]


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_config_is_valid_or_refused_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    counts, failures = try_mutants(name, 10, 3, tmp_path)
    assert not failures, failures[0]
    assert counts["refused"] > 2


def test_a_callback_whose_name_is_a_number_is_refused(tmp_path: Path):
    """In a process of its own, to see that nothing else is printed."""
    (tmp_path / "a.yaml").write_text("defaults: [nano]\ncallbacks: {7: null}\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "dsv3_lightning", "validate", "a.yaml"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "dsv3: error: callbacks.7: a name must be text, in quotes where it reads like a number\n"
