"""The plan's model of time, applied to published runs of other projects with their own settings.

python benchmarks/peers.py
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_lightning.common.table import table
from dsv3_lightning.common.yaml import loads
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig
from dsv3_lightning.planning.hardware import GPUS, Hardware
from dsv3_lightning.planning.layout import Again, Implementation, Layout, Work
from dsv3_lightning.planning.step import Step, step

FILE = Path(__file__).parent / "peers.yaml"
ALLOWED = 0.15


class Peer(NamedTuple):
    """A published run. published: lowest and highest tokens per second and GPU. planned: our model of its step."""

    name: str
    published: tuple[float, float]
    planned: Step

    @property
    def miss(self) -> float:
        """The error of the planned speed, relative to the middle of the published ones."""
        return self.planned.tokens_per_second / (sum(self.published) / 2) - 1


def peers() -> list[Peer]:
    """All runs of peers.yaml."""
    return [peer(name, settings) for name, settings in loads(FILE.read_text()).items()]


def peer(name: str, settings: dict[str, Any]) -> Peer:
    hardware = Hardware(GPUS[settings["hardware"]["gpu"]])
    code = dict(settings["code"])
    code["again"] = {policy: Again(**shares) for policy, shares in code["again"].items()}
    layout = Layout(
        MeshShape(**settings["mesh"]),
        StrategyConfig(kind="fsdp2_ep"),
        Work(**settings["work"]),
        Implementation(**code),
        hardware.rate(settings["imbalance"]),
    )
    model = check(compose([settings["model"]]).tree).model
    low, high = settings["published"]
    return Peer(name, (low, high), step(model, hardware, layout))


def main() -> None:
    found = peers()
    rows = [("run", "published", "planned", "miss", "")]
    for each in found:
        low, high = each.published
        shown = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
        verdict = "" if abs(each.miss) <= ALLOWED else f"MISSED by more than {ALLOWED:.0%}"
        rows.append((each.name, shown, f"{each.planned.tokens_per_second:,.0f}", f"{each.miss:+.1%}", verdict))
    print("tokens per second and GPU\n" + table(rows))
    for each in found:
        parts = [(part.name, f"{1e3 * seconds:,.0f} ms", f"{seconds / each.planned.seconds:.1%}")
                 for part, seconds in each.planned.exposed]  # fmt: skip
        print(f"\n{table([(each.name, 'exposed, per step', 'share'), *parts])}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
