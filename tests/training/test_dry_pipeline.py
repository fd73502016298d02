"""The memory of a pipeline's ranks, counted in passes without numbers, against the plan and the schedules' formulas."""

from dataclasses import replace
from typing import Any

import pytest

from dsv3_lightning.common.schedules import SCHEDULES, placement
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.planning.layout import Work
from dsv3_lightning.planning.pipeline.actions import schedule_slots
from dsv3_lightning.planning.pipeline.formulas import FORMULA_OF, formulas
from dsv3_lightning.planning.pipeline.memory import chunk_bytes, pipeline_memory
from dsv3_lightning.planning.pipeline.timeline import ChunkTimes, simulate
from dsv3_lightning.planning.share import chunk_shares
from dsv3_lightning.training.dry_pipeline import dry_pipeline

pytestmark = pytest.mark.slow

T, RANKS = 256, 2
# Wider than nano, so that the small things that no plan counts are small; without MTP, so that chunks are equal.
WORDS = ("model.hidden_size=256", "model.vocab_size=2048", "data.vocab_size=2048", f"data.sequence_length={T}",
         "model.num_hidden_layers=4", "model.first_k_dense_replace=0", "model.num_nextn_predict_layers=0",
         "compute.activation_checkpointing=none")  # fmt: skip
CONFIG = check(compose(["nano"], WORDS).tree)
WORK = Work(4 * T, 2 * RANKS, T, "32", "none")


def layers(schedule: str) -> list[int]:
    return [2, 2] if SCHEDULES[schedule].chunks == 1 else [1, 1, 1, 1]


def counted(schedule: str, rank: int, samples: int, policy: str, waiting: int | None = None) -> int:
    strategy = StrategyConfig(kind="fsdp2", pipeline_parallel=RANKS, schedule=schedule, waiting_weights=waiting)
    found = dry_pipeline(CONFIG.model, CONFIG.optimizer, strategy, MeshShape(1, 1, pp=RANKS), layers(schedule), rank,
                         samples, T, "32", policy)  # fmt: skip
    return found.peak


def planned(schedule: str, rank: int, samples: int, policy: str, waiting: int | None = None) -> float:
    shares, of_ranks = chunk_shares(CONFIG.model, layers(schedule)), placement(SCHEDULES[schedule], RANKS)
    slots = schedule_slots(schedule, RANKS, 2 * RANKS, waiting=waiting)
    timeline = simulate(slots, ChunkTimes.equal(len(shares)), len(shares))
    work = replace(WORK, tokens=samples * T, policy=policy)
    return pipeline_memory(CONFIG.model, MeshShape(1, 1, pp=RANKS), work, shares, of_ranks, timeline)[rank].total


def growth(of, *how: Any) -> float:
    """Twice the samples are twice the activations of live chunks; everything else stays."""
    schedule, rank, *others = how
    return of(schedule, rank, 8, *others) - of(schedule, rank, 4, *others)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
def test_the_rank_with_heads_holds_what_is_planned_and_as_many_chunks_as_the_formula_says(schedule: str):
    rank = 0 if SCHEDULES[schedule].v_shaped else 1  # with the heads
    assert planned(schedule, rank, 4, "none") == pytest.approx(counted(schedule, rank, 4, "none"), rel=0.1)
    middle = RANKS - 1 - rank  # chunks of equal layers in a V; 1F1B's first has P
    grown = growth(counted, schedule, middle, "none")
    assert growth(planned, schedule, middle, "none") == pytest.approx(grown, rel=0.1)
    chunk = chunk_bytes(CONFIG.model, WORK, chunk_shares(CONFIG.model, layers(schedule))[middle], 1).total
    formula = formulas(RANKS, 1, 2, 1, 3)[FORMULA_OF[schedule]].activations * SCHEDULES[schedule].chunks
    assert grown / chunk == pytest.approx(formula, rel=0.2)


def test_what_waits_for_weight_parts_is_planned_and_limited():
    """Where all is computed again, inputs and gradients between the parts of a backward pass are most of it."""
    free, limited = (growth(counted, "zbv", 1, "full", waiting) for waiting in (None, 1))
    assert free > 1.5 * limited
    assert growth(planned, "zbv", 1, "full") == pytest.approx(free, rel=0.2)
    assert growth(planned, "zbv", 1, "full", 1) == pytest.approx(limited, rel=0.2)
