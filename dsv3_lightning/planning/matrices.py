"""The matrices that Muon updates, and the work of orthogonalizing them (training/muon.py)."""

from typing import NamedTuple

from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.parameters import attention_shapes
from dsv3_lightning.planning.share import Share

NEWTON_SCHULZ_STEPS = 5


class Matrices(NamedTuple):
    """Matrices of one shape, so many by number. routed: whether they are of routed experts."""

    number: int
    rows: int
    columns: int
    routed: bool = False

    @property
    def numbers(self) -> int:
        return self.number * self.rows * self.columns

    @property
    def flop(self) -> int:
        """FLOP of the Newton-Schulz steps: X Xᵀ, its square, and their polynomial times X, on the shorter side."""
        short, long = sorted((self.rows, self.columns))
        return self.number * NEWTON_SCHULZ_STEPS * (4 * short * short * long + 2 * short**3)


def muon_matrices(model: ModelConfig, share: Share) -> list[Matrices]:
    """The matrices of a share: all but embedding, head and routers; gate and up of an expert are two."""
    D, narrow, wide = model.hidden_size, model.moe_intermediate_size, model.intermediate_size
    found = [Matrices(share.layers, *shape) for shape in attention_shapes(model)]
    found += [Matrices(3 * share.dense, wide, D)]
    found += [Matrices(3 * share.moe_layers, model.n_shared_experts * narrow, D)]
    found += [Matrices(3 * share.moe_layers * model.n_routed_experts, narrow, D, routed=True)]
    if model.mtp_kind == "sequential":
        found.append(Matrices(share.mtp, D, 2 * D))
    return [matrices for matrices in found if matrices.numbers]


def muon_parameters(model: ModelConfig, share: Share) -> int:
    """The number of parameters in these matrices."""
    return sum(matrices.numbers for matrices in muon_matrices(model, share))


def newton_schulz_flop(model: ModelConfig, share: Share) -> int:
    """FLOP of a step's Newton-Schulz steps, each matrix once."""
    return sum(matrices.flop for matrices in muon_matrices(model, share))


def sharded_numbers(model: ModelConfig, share: Share, dp_shard: int, ep: int, expert_shard: int) -> tuple[float, float]:
    """Numbers of a rank's shards of matrices that travel to their owners: all but experts', and experts'.

    Experts that are whole on a rank stay there.
    """
    matrices = muon_matrices(model, share)
    dense, routed = (sum(each.numbers for each in matrices if each.routed == kind) for kind in (False, True))
    whole = expert_shard == 1 or (ep == 1 and model.n_routed_experts % expert_shard == 0)
    return (dense / dp_shard if dp_shard > 1 else 0.0), (0.0 if whole else routed / dp_shard)
