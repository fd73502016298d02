"""Settings of the optimizer, the loss and activation checkpointing. Imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dsv3_lightning.common.paths import PathText
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.balance_table import BALANCE_LOSSES

if TYPE_CHECKING:
    BalanceName = str
else:
    BalanceName = Literal[(*BALANCE_LOSSES, "none")]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A phase of the learning-rate schedule that ends at `until` (share of the run's steps) with the rate `to` · lr."""

    until: float
    shape: Literal["constant", "linear", "cosine"]
    to: float


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate (V3 §4.2). Raises ConfigError.

    kind: muon is for matrices but embedding, head and routers, which have AdamW, as all other parameters do (arXiv
        2502.16982). lr, weight_decay and moments are those of both.
    lr: the peak. betas, eps: AdamW's. weight_decay: on matrices only, never on norms.
    moments: what AdamW's two moments and Muon's momentum are stored in; V3 §3.3.2 has bf16. Updates are computed in
        fp32 either way, but for Muon's Newton-Schulz steps.
    warmup_steps: linear from 0 to lr, within the first phase.
    phases: the rest, in order; `constant` stays at `to`, the others move from the previous phase's `to` to this one's.
    max_skipped_steps: steps with a non-finite loss or gradient are skipped; this many in a row stop the run.
    """

    kind: Literal["adamw", "muon"]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    moments: Literal["fp32", "bf16"]
    warmup_steps: int
    phases: list[Phase]
    max_skipped_steps: int

    @property
    def moment_bytes(self) -> int:
        """Bytes of a number in AdamW's moments and in Muon's momentum."""
        return 2 if self.moments == "bf16" else 4

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optimizer.lr={self.lr}: must be above 0")
        if not self.eps > 0:
            raise ConfigError(f"optimizer.eps={self.eps}: must be above 0")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas={list(self.betas)}: each must be in [0, 1)")
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay={self.weight_decay}: must be at least 0")
        if self.warmup_steps < 0:
            raise ConfigError(f"optimizer.warmup_steps={self.warmup_steps}: must be at least 0")
        if self.max_skipped_steps < 1:
            raise ConfigError(f"optimizer.max_skipped_steps={self.max_skipped_steps}: must be at least 1")
        ends = [phase.until for phase in self.phases]
        if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
            raise ConfigError(f"optimizer.phases: `until` must rise from above 0 to exactly 1, not {ends}")
        if any(phase.to < 0 for phase in self.phases):
            raise ConfigError("optimizer.phases: `to` is a factor on lr and must be at least 0")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """L = L_main + λ/mtp_depth · Σ_k L_mtp,k + Σ α · Σ_layers L_balance (V3 eq. 17, 25). Raises ConfigError.

    balance: the name of a balance loss in `model/balance_table.py`, a list of several, or `none`.
    balance_factor: α, or a list with one for each loss.
    mtp_weight: a constant λ; null if callbacks.mtp_weight schedules it.
    """

    balance: BalanceName | list[BalanceName]
    balance_factor: float | list[float]
    mtp_weight: float | None

    @property
    def balance_factors(self) -> dict[str, float]:
        """The factor α of each loss, by its name; empty for `none`."""
        names = [self.balance] if isinstance(self.balance, str) else self.balance
        factors = self.balance_factor if isinstance(self.balance_factor, list) else [self.balance_factor]
        return {} if names == ["none"] else dict(zip(names, factors, strict=True))

    def __post_init__(self) -> None:
        names = [self.balance] if isinstance(self.balance, str) else self.balance
        factors = self.balance_factor if isinstance(self.balance_factor, list) else [self.balance_factor]
        if not names or len(set(names)) < len(names) or ("none" in names and len(names) > 1):
            raise ConfigError(f"loss.balance={names}: must name each loss once; for none of them write none")
        if len(factors) != len(names):
            raise ConfigError(
                f"loss.balance_factor={self.balance_factor}: must be {len(names)} factors, one for each of "
                f"loss.balance={', '.join(names)}"
            )
        if min(factors) < 0:
            raise ConfigError(f"loss.balance_factor={self.balance_factor}: must be at least 0")
        if self.mtp_weight is not None and self.mtp_weight < 0:
            raise ConfigError(f"loss.mtp_weight={self.mtp_weight}: must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Trade-offs between memory, speed and rounding.

    activation_checkpointing: `none` keeps all activations; `selective` recomputes norms, activations and MLA's
        up-projections in the backward pass (V3 §3.2.3); `full` recomputes whole blocks.
    fp8: `emulated` rounds the operands of the blocks' products to FP8 and multiplies in fp32 (V3 §3.3); True takes the
        device's FP8 products, without those of routed experts.
    compile: whether torch.compile fuses element-wise functions; `auto` where that is cached or takes less than 15 s.
    compile_cache: the folder with what was compiled, which may be read-only.
    """

    activation_checkpointing: Literal["none", "selective", "full"]
    fp8: Literal[False, True, "emulated"]
    compile: Literal["auto", True, False]
    compile_cache: PathText
