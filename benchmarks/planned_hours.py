"""Planned GPU hours per trillion tokens of V3 on 2,048 H800, step by step, with the assumption of each step.

python benchmarks/planned_hours.py

First by state of this project's code without a pipeline, then in the report's layout, then with what the published run
has and this code hasn't. Nothing in the plan is fitted to the published 180,000.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

from dsv3_lightning.commands.plan_cluster import layout_of, strategy_of, work_of
from dsv3_lightning.commands.plan_pipeline import pipeline_work, plan_pipeline
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.parallel.mesh import mesh_shape
from dsv3_lightning.planning.hardware import GPUS, Hardware
from dsv3_lightning.planning.layout import BY_NODE, HISTORY, WHAT_IF, Again, Implementation
from dsv3_lightning.planning.step import Step, step

GPUS_OF_RUN, HARDWARE = 2048, Hardware(GPUS["h800"])
FILE = "configs/cluster/v3-2048.yaml"
# Four copies of the model, each sharded over 512 ranks.
WITHOUT_PIPELINE = (
    "strategy.pipeline_parallel=1", "strategy.micro_batches=auto", "strategy.waiting_weights=null",
    "strategy.overlap=none", "strategy.dp_replicate=4", "data.batch_size=16384", "data.batch_ramp=null",
    "trainer.accumulate_grad_batches=2",
)  # fmt: skip
FP8 = replace(BY_NODE, fp8=WHAT_IF)
FUSED = replace(FP8, fused=True)
DEEPEP = replace(FUSED, exchange="fused", rows="fused")
# The report recomputes norms, SwiGLU and MLA's up-projections (§3.2.3), which are 54.5 of the 233 million weights of a
# MoE layer outside of its routed experts.
REPORTS = replace(DEEPEP, again={"full": Again(0, 0, 54.5 / 233, 1, 0, 0)})


@dataclass(frozen=True)
class Row:
    """A state of the code, or a plan of it. assumption: what it takes for granted."""

    state: str
    assumption: str
    planned: Step

    @property
    def hours(self) -> float:
        return 1e12 / self.planned.tokens_per_second / 3600

    @property
    def mfu(self) -> float:
        return self.planned.flop / self.planned.seconds / HARDWARE.gpu.peak

    def __str__(self) -> str:
        return (f"| {self.state} | {self.assumption} | {self.planned.seconds:.2f} s | {100 * self.mfu:.1f} % "
                f"| {self.hours:,.0f} |")  # fmt: skip


def without_pipeline() -> list[Row]:
    """By state of the code."""
    config = check(compose([FILE], WITHOUT_PIPELINE).tree)
    strategy, _ = strategy_of(config)
    shape = mesh_shape(strategy, GPUS_OF_RUN, HARDWARE.gpu.per_node, config.model)
    layout = layout_of(config, shape, strategy, work_of(config, GPUS_OF_RUN), HARDWARE)
    return [Row(state, "", step(config.model, HARDWARE, replace(layout, code=code))) for state, code in HISTORY.items()]


def pipelined(config: Config, schedule: str, code: Implementation, overlap: bool) -> Step:
    strategy = replace(strategy_of(config)[0], schedule=schedule, overlap="pairs" if overlap else "none")
    shape = mesh_shape(strategy, GPUS_OF_RUN, HARDWARE.gpu.per_node, config.model)
    layout = layout_of(config, shape, strategy, pipeline_work(config, strategy, shape.data_ranks), HARDWARE)
    return plan_pipeline(config, strategy, replace(layout, code=code), HARDWARE, overlap).step.step


def in_the_reports_layout() -> list[Row]:
    """From this code to all that the published run has."""
    config = check(compose([FILE], ["data.batch_ramp=null"]).tree)
    steps: list[tuple[Any, ...]] = [
        ("the report's layout, `zbv`", "PP16, EP64, 120 micro-batches of 4,096 tokens; everything but norms is "
         "computed again (`full`), since nothing less fits; every all-to-all in the open", "zbv", BY_NODE, False),
        ("`dualpipev` in its place", "its pairs run one after the other", "dualpipev", BY_NODE, False),
        ("with overlap", "in a pair all of the exchange hides, and computing keeps 112 of 132 SMs meanwhile "
         "(§3.2.2)", "dualpipev", BY_NODE, True),
        ("and FP8", "all products but heads and routers at DeepGEMM's rates on H800, tiles written by kernels of "
         "their own, tokens travel to experts in one byte", "dualpipev", FP8, True),
        ("and fused kernels", "norms, rotations, activations and tiles pass over memory once; not in this code",
         "dualpipev", FUSED, True),
        ("and DeepEP's kernels", "a token once to each node and each rank at DeepEP's rates, no sorting of its own; "
         "not in this code", "dualpipev", DEEPEP, True),
        ("and the report's recomputation", "norms, SwiGLU and up-projections alone are computed again, which needs "
         "activations in FP8 to fit; not in this code", "dualpipev", REPORTS, True),
    ]  # fmt: skip
    return [Row(state, assumption, pipelined(config, *how)) for state, assumption, *how in steps]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for row in (*without_pipeline(), *in_the_reports_layout()):
        print(row)
