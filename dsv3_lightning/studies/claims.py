"""The papers' claims as inequalities between variants of an experiment, and their verdicts from our runs."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dsv3_lightning.studies.compare import COLUMNS, Finished, spread

REPRODUCED, NOT, UNDECIDED, MISSING = "reproduced", "not reproduced at this scale", "undecided", "not run"
EXPERIMENTS = ("balance", "bias_speed", "mtp", "moe", "attention", "routing", "optimizer", "fp8")
SEEDS = 3  # minimum for a verdict
STUDENT = (2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)  # 95 % quantiles of t for 3, 4, … seeds


@dataclass(frozen=True)
class Claim:
    """The inequality times · low < high in a column of `dsv3 compare`; low and high are variants or numbers."""

    text: str
    source: str
    published: str
    experiment: str
    column: str
    low: str | float
    high: str | float
    times: float = 1.0


LF, V3, V2, MOE = "arXiv 2408.15664", "arXiv 2412.19437", "arXiv 2405.04434", "arXiv 2401.06066"
MTP, MUON = "arXiv 2404.19737", "arXiv 2502.16982"
VIO, LOSS, KEPT, SPECIAL = "MaxVio global", "val loss", "MTP accepted", "specialization"
CLAIMS = (
    Claim("The bias alone balances: MaxVio_global at most 0.10",
          f"{LF} table 2", "0.04 (1B and 3B)", "balance", VIO, "loss_free", 0.10),
    Claim("It is at least 4 times lower than without balancing",
          f"{LF} table 2", "0.04; not printed without balancing", "balance", VIO, "loss_free", "none", 4.0),
    Claim("It is lower than with an auxiliary loss",
          f"{LF} table 2", "0.04 against 0.72 (1B), 0.52 (3B)", "balance", VIO, "loss_free", "sequence"),
    Claim("The bias costs less loss than a sequence-wise loss",
          f"{V3} §4.5.3", "2.253 against 2.258 (1B), 2.080 against 2.085 (3B)",
          "balance", LOSS, "loss_free", "sequence"),
    Claim("The same holds at equal balance (a sequence-wise loss with α = 0.1)",
          f"{V3} §4.5.3", "2.253 against 2.258 (1B), 2.080 against 2.085 (3B)",
          "balance", LOSS, "loss_free", "sequence_strong"),
    Claim("A batch-wise loss costs less than a sequence-wise one",
          f"{V3} §4.5.3", "2.253 against 2.258 (1B), 2.080 against 2.085 (3B)", "balance", LOSS, "batch", "sequence"),
    Claim("A sequence-wise loss keeps experts from specializing",
          f"{V3} figure 9", "maps of the load by domain", "balance", SPECIAL, "sequence", "loss_free"),
    Claim("u = 0.0001 balances worse than 0.001: too slow at the start",
          f"{LF} §4.3", "a curve", "bias_speed", VIO, "u_0.001", "u_0.0001"),
    Claim("A u that is too large never settles: here 0.1, compared with 0.01",
          f"{LF} §4.3", "a curve; there 0.01, compared with 0.001", "bias_speed", VIO, "u_0.01", "u_0.1"),
    Claim("u = 0.001 has a lower loss than 0.01, which fluctuates late",
          f"{LF} §4.3", "perplexity about 9.50 against 9.51", "bias_speed", LOSS, "u_0.001", "u_0.01"),
    Claim("The sign rule has a lower loss than steps proportional to the violation",
          f"{LF} §4.3", "no better", "bias_speed", LOSS, "u_0.01", "proportional_0.01"),
    Claim("The sign rule has a lower loss than a multiplicative bias",
          f"{LF} §4.3", "no better", "bias_speed", LOSS, "u_0.01", "multiplicative_0.01"),
    Claim("Predicting one more token helps the main model",
          f"{V3} table 4", "most benchmarks, at 15.7B and 228.7B", "mtp", LOSS, "depth_1", "without"),
    Claim("At least 85 % of second tokens are accepted",
          f"{V3} §5.4.3", "85 to 90 %", "mtp", KEPT, 0.85, "depth_1"),
    Claim("λ = 0.3, later 0.1, costs the main model less than λ = 1",
          f"{V3} §4.2", "no number: V3's choice", "mtp", LOSS, "depth_1", "depth_1_lambda_1"),
    Claim("Predicting two more tokens helps the main model",
          MTP, "no number: more for larger models", "mtp", LOSS, "depth_2", "without"),
    Claim("Chained modules cost the main model less than parallel heads, at depth 2",
          f"{V3} §2.2", "no number: V3's choice", "mtp", LOSS, "depth_2", "parallel_2"),
    Claim("Chained modules predict the second token better than parallel heads",
          f"{V3} §2.2", "no number: V3's choice", "mtp", KEPT, "parallel_2", "depth_2"),
    Claim("Fine-grained experts with a shared one beat few wide ones",
          f"{MOE} §4", "at equal size", "moe", LOSS, "fine_grained", "gshard_like"),
    Claim("MLA beats multi-head attention", f"{V2} app. D", "most benchmarks", "attention", LOSS, "mla", "mha"),
    Claim("Multi-head attention beats grouped-query attention",
          f"{V2} app. D", "most benchmarks, at 7B", "attention", LOSS, "mha", "gqa_2"),
    Claim("Multi-head attention beats multi-query attention",
          f"{V2} app. D", "most benchmarks, at 7B", "attention", LOSS, "mha", "mqa"),
    Claim("Experts from 2 of 4 groups cost at most 1 % of the loss",
          f"{V2} §2.2.2", "no number: roughly aligned with 3 devices or more; the 1 % is ours",
          "routing", LOSS, "sigmoid_2_of_4_groups", "sigmoid_no_groups", 0.99),
    Claim("A sigmoid gate has a lower loss than V2's softmax",
          f"{V3} §2.1.2", "no number: V3's choice", "routing", LOSS, "sigmoid_2_of_4_groups", "softmax_2_of_4_groups"),
    Claim("Muon has a lower loss than AdamW at equal tokens",
          f"{MUON} §3.2", "the same loss with about half of the FLOP", "optimizer", LOSS, "muon", "adamw"),
    Claim("FP8 in tiles costs at most 0.25 % of the loss",
          f"{V3} §3.3, app. B.1", "less than 0.25 %, at 16B and 230B", "fp8", LOSS, "tiles", "bf16", 0.9975),
    Claim("FP8 in tiles costs less than with one scale for each matrix",
          f"{V3} §3.3.2", "no number: V3's choice", "fp8", LOSS, "tiles", "one_scale"),
)  # fmt: skip


def verdict(differences: list[float]) -> str:
    """The verdict on a claim that the differences, one per seed, are above 0: one-sided Student's t at 5 % either way.

    >>> verdict([1.0, 1.1, 0.9]), verdict([-0.2, 0.3, 0.1]), verdict([-1.0, -1.1, -0.9]), verdict([1.0, 1.0])
    ('reproduced', 'undecided', 'not reproduced at this scale', 'undecided')
    """
    if len(differences) < SEEDS:
        return UNDECIDED if differences else MISSING
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    quantile = STUDENT[min(len(differences) - SEEDS, len(STUDENT) - 1)]
    mean = statistics.fmean(differences)
    if abs(mean) <= quantile * error:
        return UNDECIDED
    return REPRODUCED if mean > 0 else NOT


def judge(claim: Claim, groups: Mapping[str, list[Finished]]) -> tuple[str, str]:
    """Our numbers and the verdict, from an experiment's finished runs by variant, paired by seed."""
    form, value = COLUMNS[claim.column]
    sides = [by_seed(side, groups, value) for side in (claim.low, claim.high)]
    seeds = set.union(*(set(side) for side in sides if isinstance(side, dict)))
    values = [side if isinstance(side, dict) else dict.fromkeys(seeds, side) for side in sides]
    low, high = values
    common = sorted(low.keys() & high.keys())
    texts = [spread(list(side.values()), form) if isinstance(side, dict) else form.format(side) for side in sides]
    return " against ".join(texts), verdict([high[seed] - claim.times * low[seed] for seed in common])


def by_seed(
    side: str | float, groups: Mapping[str, list[Finished]], value: Callable[[Finished], float | None]
) -> dict[int, float] | float:
    """A variant's values by seed; a number is returned unchanged."""
    if isinstance(side, float):
        return side
    return {run.config.run.seed: number for run in groups.get(side, []) if (number := value(run)) is not None}
