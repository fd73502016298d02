"""`make gpu-check`: which packages it asks for, and what its report says. The checks themselves are in tests/gpu."""

import re
import sys
from importlib.metadata import requires

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Check


def test_it_asks_for_the_dependencies_of_the_package():
    needed = {re.split(r"[<>=!\[; ]", line)[0] for line in requires("dsv3-lightning") if "extra ==" not in line}
    assert needed < set(gpu_check.requirements())
    assert gpu_check.missing(gpu_check.requirements()) == []
    assert gpu_check.missing(["torch", "no-such-package"]) == ["no-such-package"]


def check(name: str, code: str, cpu: bool = True) -> Check:
    words = ["-c", code]
    return Check(name, words, 30, words if cpu else None)


def test_the_report_has_each_check_with_its_output(tmp_path, monkeypatch):
    checks = [
        check("good", "print('fine')"),
        check("bad", "raise SystemExit('broken')"),
        check("only gpu", "", cpu=False),
    ]
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    monkeypatch.setattr(gpu_check, "machine", lambda: ["There is no CUDA GPU here: small sizes."])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    assert gpu_check.main() == 1
    report = (tmp_path / "report.md").read_text()
    assert re.search(r"## good: passed \(\d+ s\)\n\n```text\nfine\n```", report)
    assert re.search(r"## bad: FAILED, exit code 1 \(\d+ s\)\n\n```text\nbroken\n```", report)
    assert "## only gpu: left out: needs a GPU" in report and "There is no CUDA GPU here" in report
    assert (tmp_path / "bad.txt").read_text() == "broken\n"


def test_a_folder_without_wheels_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--wheels", str(tmp_path)])
    with pytest.raises(SystemExit) as refused:
        gpu_check.main()
    assert str(refused.value) == f"gpu-check: --wheels {tmp_path}: there is no *.whl file"
