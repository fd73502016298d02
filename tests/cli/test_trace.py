"""`dsv3 trace`, on traces with times that are made up."""

from pathlib import Path

import pytest

from dsv3_lightning.cli import main
from dsv3_lightning.planning.pipeline.actions import schedule_slots
from dsv3_lightning.planning.pipeline.measured import write_trace
from dsv3_lightning.planning.pipeline.timeline import ChunkTimes, simulate


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    """A run of ZB-V on two ranks in which a forward pass, and each part of a backward pass, takes 10 ms."""
    times = ChunkTimes.equal(4, F=0.01, I=0.01, W=0.01)
    timeline = simulate(schedule_slots("zbv", 2, 4), times, 4)
    for rank, events in enumerate(timeline.ranks):
        write_trace(tmp_path, rank, {10: events, 20: events})
    return tmp_path


def test_a_trace_is_drawn_beside_its_simulation(traced: Path, capsys: pytest.CaptureFixture[str]):
    picture = traced / "trace.png"
    assert main(["trace", str(traced), "--png", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "step 20, measured" in shown and "simulated from the chunks' median times" in shown
    drawn = [line for line in shown.splitlines() if line.startswith("rank 0 F")]
    assert len(drawn) == 2 and drawn[0] == drawn[1]
    rows = {" ".join(line.split()[:-2]): line.split()[-2:] for line in shown.splitlines() if "%" in line}
    assert rows["bubble share of all ranks"] == ["4.0%", "4.0%"]  # (P - 1) F of 25 F
    assert rows["from each rank's first to its last action"] == ["0.0%", "0.0%"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_step_that_was_not_traced_is_refused(traced: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["trace", str(traced), "--step", "7"]) == 2
    assert "--step 7: was not traced; must be 10, 20" in capsys.readouterr().err


def test_a_folder_without_traces_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["trace", str(tmp_path)]) == 2
    assert "has no trace of a pipeline" in capsys.readouterr().err
