"""The planned hours of V3 in docs/pipelines.md and docs/cluster.md are those that the command prints."""

import runpy

import pytest

from dsv3_lightning.cli import main
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def hours() -> dict:
    return runpy.run_path(str(ROOT / "benchmarks/planned_hours.py"))


@pytest.mark.slow
def test_the_pages_have_the_hours_that_the_command_prints(hours: dict, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/pipelines.md").read_text()
    found = hours["in_the_reports_layout"]()
    for row in found:
        assert str(row) in page, row
    assert main(["plan", "configs/cluster/v3-2048.yaml", "--gpus", "2048", "--gpu", "h800"]) == 0
    assert f"{found[2].hours:,.0f}" in capsys.readouterr().out  # strategy.overlap=pairs
    before = hours["without_pipeline"]()
    assert f"| {before[-1].planned.seconds:.2f} s | {100 * before[-1].mfu:.1f} % | {before[-1].hours:,.0f} |" in page
    of_the_review = (ROOT / "docs/cluster.md").read_text()
    for row in before:
        assert f"| {row.planned.seconds:.2f} s | {100 * row.mfu:.1f} % | {row.hours:,.0f} |" in of_the_review
    # each step on the way to all that the published run has takes time off, but for dualpipev without overlap
    after = [row.hours for row in found]
    assert after[1] > after[0] and after[1:] == sorted(after[1:], reverse=True)
