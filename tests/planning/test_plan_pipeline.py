"""`dsv3 plan` of a pipeline: its timeline, its bubbles beside the formulas, and what can't be planned."""

from pathlib import Path

import pytest

from dsv3_lightning.cli import main
from dsv3_lightning.planning.pipeline.actions import schedule_slots
from dsv3_lightning.planning.pipeline.measured import write_trace
from dsv3_lightning.planning.pipeline.timeline import ChunkTimes, simulate

NANO = ["plan", "nano", "model.num_hidden_layers=8", "data.batch_size=16"]
V3 = ["plan", "v3", "--gpus", "2048", "--gpu", "h800", "--pipeline-parallel", "16", "--micro-batches", "120",
      "strategy={kind: fsdp2_ep, expert_parallel: 64, pipeline_parallel: 16, waiting_weights: 1}",
      "trainer.precision=bf16", "data.batch_ramp=null", "trainer.accumulate_grad_batches=1",
      "compute.activation_checkpointing=full"]  # fmt: skip


def rows(shown: str) -> dict[str, list[str]]:
    """The tables' rows: cells by the first one."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in shown.splitlines() if line.strip()]
    return {cells[0]: cells[1:] for cells in lines}


@pytest.mark.parametrize(
    ("schedule", "times", "bubble", "live"),
    [  # of chunks: (P - 1)(F + B); / 2; (P - 1)(F + B - 2W) / 2; 0; (P - 1)(F&B + B - 3W) / 2, of a whole rank
        ("1f1b", "1,1,1", "9 s", "4"),
        ("interleaved_1f1b", "1,1,1", "9 s", "5.5"),
        ("interleaved_zero_bubble", "1,1,1", "3 s", "4"),
        ("zbv", "1,1,1", "0 s", "4"),
        ("dualpipev", "1,1,1", "6 s", "4.5"),
        ("dualpipev", "1,1,1,2.4", "4.2 s", "4.5"),
    ],
)
def test_every_schedule_is_drawn_with_its_formula_beside_the_simulation(
    schedule: str, times: str, bubble: str, live: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*NANO, "--pipeline-parallel", "4", "--schedule", schedule, "--times", times]) == 0
    shown = capsys.readouterr().out
    found = rows(shown)
    assert found["bubble of the rank that waits longest"] == [bubble, bubble]
    assert found["peak activations, in those of a P-th of the model"] == [live, live]
    assert f"{schedule} on 4 ranks, 8 micro-batches of 128 tokens" in shown
    drawn = [line for line in shown.splitlines() if line.startswith("rank ") and "FF" in line.replace("f", "F")]
    assert len(drawn) >= 4
    assert "exposed: activations between stages" not in shown  # given times have none


def test_settings_of_the_strategy_block_are_planned_and_flags_replace_them(tmp_path: Path, capsys):
    block = "strategy={kind: fsdp2, pipeline_parallel: 2, schedule: zbv, micro_batches: 4, stages: [2, 2, 3, 1]}"
    picture = tmp_path / "timeline.png"
    assert main([*NANO, block, "trainer.devices=2", "--png", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "2 H100, fsdp2: pp 2 x dp_replicate 1 x dp_shard 1" in shown and "zbv on 2 ranks, 4 micro-batches" in shown
    assert rows(shown)["0"][:1] == ["2 + 1, embedding, heads"] and rows(shown)["1"][:1] == ["2 + 3"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*NANO, block, "trainer.devices=2", "--schedule", "dualpipev", "--micro-batches", "8"]) == 0
    assert "dualpipev on 2 ranks, 8 micro-batches of 128 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_v3_in_the_reports_layout_with_overlap_and_fp8(capsys: pytest.CaptureFixture[str]):
    def planned(*words: str) -> tuple[dict[str, list[str]], float]:
        assert main([*V3, "--schedule", "dualpipev", *words]) == 0
        found = rows(capsys.readouterr().out)
        return found, float(found["GPU hours per trillion tokens"][0].replace(",", ""))

    plain, overlap, fp8 = planned(), planned("--overlap"), planned("--overlap", "--fp8")
    assert plain[1] > 1.2 * overlap[1] > 1.2 * 1.2 * fp8[1]
    assert rows_exposed(plain[0]) > 2 * rows_exposed(overlap[0])
    assert "tiles in FP8 and back" in fp8[0] and "tiles in FP8 and back" not in overlap[0]
    assert plain[0]["sum"][1].startswith("fits")
    assert plain[0]["0"][0] == "1 + 0, embedding, heads" and plain[0]["15"][0] == "2 + 2"
    assert plain[0]["15"][3] == "33"  # PP + 1 chunks, where a rank has two of 32


def rows_exposed(found: dict[str, list[str]]) -> float:
    return float(found["exposed: tokens to experts and back"][0].split()[0])


def test_measured_times_are_those_of_a_runs_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    times = ChunkTimes([1.0] * 4, [1.5] * 4, [0.5] * 4)
    traced = simulate(schedule_slots("zbv", 2, 4), times, 4)
    for rank, events in enumerate(traced.ranks):
        write_trace(tmp_path, rank, {1: events})
    words = [*NANO, "--pipeline-parallel", "2", "--micro-batches", "4", "--times", str(tmp_path)]
    assert main([*words, "--schedule", "zbv"]) == 0
    assert rows(capsys.readouterr().out)["span of a step"] == [f"{traced.span:.4g} s"]
    assert main([*words, "--schedule", "interleaved_1f1b"]) == 0  # another schedule with the same chunks
    other = simulate(schedule_slots("interleaved_1f1b", 2, 4), times, 4)
    assert rows(capsys.readouterr().out)["span of a step"] == [f"{other.span:.4g} s"]
    assert main([*words, "--schedule", "1f1b"]) == 2
    assert "its trace has 4 chunks, the planned pipeline has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedule", "zbv"], "--schedule: needs a pipeline; add --pipeline-parallel P, of at least 2"),
        (["--png", "x.png"], "--png: needs a pipeline"),
        (["--overlap"], "--overlap: needs a pipeline"),
        (["--schedule", "gpipe"], "argument --schedule: invalid choice: 'gpipe'"),
        (["--pipeline-parallel", "2", "--overlap"], "--overlap: zbv pairs no passes; only dualpipev does"),
        (["--pipeline-parallel", "2", "--schedule", "dualpipev", "--micro-batches", "3"],
         "strategy.micro_batches=3: dualpipev on 2 ranks needs at least twice pipeline_parallel; use 4"),
        (["--pipeline-parallel", "2", "--micro-batches", "5"],
         "data.batch_size=16: does not divide into micro_batches=5 × 1 data-parallel ranks = 5 equal parts; use 15 or"),
        (["--pipeline-parallel", "8"], "model.num_hidden_layers=8: 16 chunks of a pipeline need at least 15"),
        (["--pipeline-parallel", "2", "--fp8"], "--fp8: model.hidden_size=64 in precision"),
        (["--pipeline-parallel", "2", "--fp8", "--gpu", "a100"], "--fp8: is planned for Hopper alone"),
        (["--pipeline-parallel", "2", "--times", "1,2"], "--times 1,2: must be a run's folder with a trace, or"),
        (["--pipeline-parallel", "2", "--times", "1,0,2"], "--times 1,0,2: must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_in_one_line(words: list[str], message: str, capsys):
    assert main([*NANO, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
