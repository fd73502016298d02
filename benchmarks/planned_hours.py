"""Planned GPU hours per trillion tokens of V3 on 2,048 H800, by state of this project's code.

python benchmarks/planned_hours.py
"""

import argparse
from dataclasses import replace

from dsv3_lightning.commands.plan_cluster import layout_of, strategy_of, work_of
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.parallel.mesh import mesh_shape
from dsv3_lightning.planning.hardware import GPUS, Hardware
from dsv3_lightning.planning.layout import HISTORY
from dsv3_lightning.planning.step import step


def rows() -> list[tuple[str, float, float, float]]:
    """State of the code, seconds of a step, MFU, GPU hours per trillion tokens."""
    config = check(compose(["configs/cluster/v3-2048.yaml"]).tree)
    hardware, gpus = Hardware(GPUS["h800"]), 2048
    strategy, _ = strategy_of(config)
    shape = mesh_shape(strategy, gpus, hardware.gpu.per_node, config.model)
    layout = layout_of(config, shape, strategy, work_of(config, gpus), hardware)
    found = []
    for state, code in HISTORY.items():
        planned = step(config.model, hardware, replace(layout, code=code))
        mfu = planned.flop / planned.seconds / hardware.gpu.peak
        found.append((state, planned.seconds, mfu, 1e12 / planned.tokens_per_second / 3600))
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for state, seconds, mfu, hours in rows():
        print(f"| {state} | {seconds:.2f} s | {100 * mfu:.1f} % | {hours:,.0f} |")
