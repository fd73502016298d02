"""Long work says how far it is, in plain lines where nobody watches a terminal."""

import re
import sys

import pytest

from dsv3_lightning.data.text.progress import progress


@pytest.mark.parametrize(("total", "line"), [(4_000_000, r"work: 1\.0 MB, \d+ s left"), (None, r"work: 1\.0 MB")])
def test_plain_lines_come_now_and_then(capsys: pytest.CaptureFixture[str], total: int | None, line: str) -> None:
    with progress("work", total, every_seconds=0.0) as advance:
        advance(1_000_000)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(line, first) and re.fullmatch(r"work: 1\.0 MB in \d\.\d s", last)
    with progress("work", total) as advance:
        advance(1_000_000)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("total", [4_000_000, None])
def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, total: int | None
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("work", total) as advance:
        advance(4_000_000)
    assert "work" in capsys.readouterr().err
