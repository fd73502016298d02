"""The time of a step from its parts: computing adds up; communication beside it counts as far as it takes longer."""

from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.flops import training_flop_per_token
from dsv3_lightning.planning.hardware import Hardware
from dsv3_lightning.planning.layout import Layout
from dsv3_lightning.planning.parts import Part
from dsv3_lightning.planning.wires import parts


class Exposed(NamedTuple):
    """A part, and the seconds that it adds to the step."""

    part: Part
    seconds: float


class Step(NamedTuple):
    """A step by parts. tokens: of one rank. flop: of one rank, without what is computed again."""

    exposed: list[Exposed]
    tokens: int
    flop: float

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.exposed)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one GPU."""
        return self.tokens / self.seconds

    @property
    def coefficients(self) -> list[str]:
        """Names of all coefficients that the time follows from."""
        return sorted({name for each in self.exposed for name in each.part.source})


def exposed(found: list[Part]) -> list[Exposed]:
    """The seconds that each part adds. Parts hidden under the same others share, in proportion, what exceeds these."""
    alone = {part.name: part.seconds for part in found if not part.hidden_under}
    result = []
    for part in found:
        if not part.hidden_under:
            result.append(Exposed(part, part.seconds))
            continue
        beside = sum(other.seconds for other in found if other.hidden_under == part.hidden_under)
        cover = sum(alone.get(name, 0.0) for name in part.hidden_under)
        excess = max(0.0, beside - cover)
        result.append(Exposed(part, excess * part.seconds / beside if beside else 0.0))
    return result


def step(model: ModelConfig, hardware: Hardware, layout: Layout) -> Step:
    """The planned step of a layout on this hardware."""
    work = layout.work
    tokens = work.tokens * work.micro_batches
    flop = training_flop_per_token(model, work.sequence_length) * tokens
    return Step(exposed(parts(model, hardware, layout)), tokens, flop)
