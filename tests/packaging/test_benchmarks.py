"""Every benchmark explains itself with --help, and measures nothing then."""

import runpy
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_help_is_shown_in_place_of_a_measurement(file: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(file), run_name="__main__")
    assert not stop.value.code and capsys.readouterr().out.startswith(f"usage: {file.name} [-h]")
