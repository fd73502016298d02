"""Validation, checkpoints and failures as shares of a day, and the longest sequence of a rank, by hand."""

import contextlib
import io
import re
from dataclasses import replace

import pytest

from dsv3_lightning.cli import main
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.planning import contexts, day
from dsv3_lightning.planning.cluster import rank_memory
from dsv3_lightning.planning.layout import Work
from tests.conftest import ROOT

# Every 1,000 steps of 9 s 100 batches of validation; a checkpoint of 8 TB every 20 minutes, by 256 nodes.
SCHEDULE = day.Schedule(
    validate_every=9000.0, batches=100, save_every=1200.0, state=8e12, kept=3, sharded=True,
)  # fmt: skip


def test_shares_by_hand():
    validation, saving, failures = day.losses(SCHEDULE, step=9.0, gpus=2048, per_node=8)
    assert validation.seconds == 300 and validation.share == pytest.approx(300 / 9300)  # a third of a step each
    assert saving.seconds == pytest.approx(8e12 / 2048 / 10e9) and saving.every == 1200
    # 419 failures of 16,384 GPUs in 54 days: 0.97 a day of 2,048; 80 s of writing at 100 GB/s, 600 s to restart
    assert failures.every == pytest.approx(86400 / (2048 * 419 / 54 / 16384))
    assert failures.seconds == pytest.approx(600 + 600 + 80)
    assert failures.share == pytest.approx(failures.seconds / failures.every)


def test_one_file_is_written_by_one_node_while_all_wait():
    whole = replace(SCHEDULE, sharded=False)
    assert day.write_seconds(whole, 2048, 8) == pytest.approx(8e12 / 2e9)
    assert day.losses(whole, 9.0, 2048, 8)[1].share == pytest.approx(4000 / 5200)


def test_what_takes_more_than_2_percent_of_a_day_is_a_warning():
    found = day.losses(SCHEDULE, 9.0, 2048, 8)
    assert [line.split(":")[1] for line in day.warnings(found, SCHEDULE, 2048, 8)] == [" validation"]
    hasty = replace(SCHEDULE, save_every=60.0, batches=0)
    late = day.warnings(day.losses(hasty, 9.0, 2048, 8), hasty, 2048, 8)
    assert late == ["WARNING: writing a checkpoint takes 1 min, and one is due every 1"]


def test_the_longest_sequence_is_the_one_before_the_first_that_does_not_fit():
    model = check(compose(["v3"]).tree).model
    shape, strategy = MeshShape(1, 2048, 64), StrategyConfig(kind="fsdp2_ep")
    work = Work(4096, 1, 4096, "bf16", "full")

    def needed(length: int) -> float:
        return rank_memory(model, shape, strategy, replace(work, tokens=length, sequence_length=length)).total

    fits = contexts.longest(needed, 80e9)
    assert fits % 1024 == 0 and needed(fits) <= 80e9 < needed(fits + 1024)
    assert contexts.longest(needed, 1e9) == 0


PLAN_V3 = ["plan", str(ROOT / "configs/cluster/v3-2048.yaml"), "--gpus", "2048", "--gpu", "h800"]


@pytest.fixture(scope="module")
def plan_of_v3() -> str:
    """What the plan of V3 on 2,048 GPUs prints."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main(PLAN_V3) == 0
    return shown.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("length", "gigabytes"), [(32768, 119.8), (131072, 438.8)])
def test_a_length_beyond_a_rank_is_refused_with_the_longest_that_fits(
    length: int, gigabytes: float, plan_of_v3: str, capsys: pytest.CaptureFixture[str]
):
    long = [f"data.sequence_length={length}", f"model.max_position_embeddings={length}"]
    assert main([*PLAN_V3, *long]) == 2
    error = capsys.readouterr().err
    refused = re.search(rf"data.sequence_length={length}: one sample needs ([0-9.]+ GB) on a rank, of 80 GB", error)
    assert refused and float(refused[1].split()[0]) == pytest.approx(gigabytes, abs=1) and error.count("\n") == 1
    fits = re.search(r"the longest that fits is (\d+)", error)
    assert fits and 16000 < int(fits[1]) < 32768
    row = next(line for line in plan_of_v3.splitlines() if line.startswith(f"{length:,} positions"))
    # long samples make attention more costly, and layers are split anew, so that the refused run needs a little more
    assert float(row.split()[2]) == pytest.approx(gigabytes, rel=0.1) and row.endswith("DOES NOT FIT")
    assert "longest that fits" in plan_of_v3


CLUSTER = {"v2-lite-8": "8", "moonlight-16": "16", "v3-256": "256", "v3-2048": "2048"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLUSTER)
def test_cluster_configs_spend_their_days_training(name: str, capsys):
    assert main(["plan", str(ROOT / f"configs/cluster/{name}.yaml"), "--gpus", CLUSTER[name]]) == 0
    shown = capsys.readouterr().out
    assert "WARNING" not in shown and "every_n" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("sum with 1.5 times the routed tokens"))
    assert row.endswith("  fits")  # a rank with popular experts runs out of memory first


@pytest.mark.slow
def test_validation_on_2_percent_of_the_corpus_takes_longer_than_the_training_between(capsys):
    assert main([*PLAN_V3, "data.validation_fraction=0.02", "trainer.limit_val_batches=1.0"]) == 0
    # 0.02 · 235,240 batches forward, a third of a step each, after 1,000 steps
    share = 0.02 * 235240 / 3 / (1000 + 0.02 * 235240 / 3)
    assert f"WARNING: validation: {share:.1%} of the time" in capsys.readouterr().out
