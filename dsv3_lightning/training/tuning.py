"""Settings of preference and reinforcement learning, which take the place of the language-model loss. No torch."""

import re
from dataclasses import dataclass
from typing import Literal

from dsv3_lightning.errors import ConfigError

MTP = Literal["detached", "frozen"]


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimization (arXiv 2305.18290) on pairs of answers. Raises ConfigError.

    beta: how closely the model is kept to the one it starts from.
    by_length: log-probabilities are means over an answer's tokens in place of sums; beta is then larger, such as 5.
    mtp: detached trains the MTP modules on the chosen answers without gradients into the main model; frozen keeps them.
    """

    beta: float = 0.1
    by_length: bool = False
    mtp: MTP = "detached"

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"dpo.beta={self.beta}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group relative policy optimization (arXiv 2402.03300; V3 §5.2.2) on prompts. Raises ConfigError.

    rewards: functions as module:name, called as TRL's are: with prompts, completions, completion_ids and every further
        field of the prompts' lines as lists; each returns a list of numbers, or None where it does not apply.
    reward_weights: a factor for each function; None: all 1.
    reward_seconds: the time limit of a call; beyond it the run stops.
    normalize: `sum` centers the weighted sum of the rewards; `each` normalizes every function's rewards first.
    group_size: answers per prompt. max_new_tokens: the longest answer. temperature: that of sampling, and of every
        log-probability.
    updates: optimizer steps that share one sampling; above 1 the later ones are off-policy, and clipping acts.
    variant: how token losses are averaged: grpo per answer, dr_grpo by a constant, dapo over all tokens.
    scale: group divides by the standard deviation of the group's rewards; none does not.
    clip: the largest fall and rise of a token's probability ratio, ε_low and ε_high.
    beta: the factor of the KL divergence from the reference (k3); 0 needs no reference.
    reference_steps: the reference is replaced by the model after so many steps; None: never.
    replay_routes: the training pass takes the experts that the rollout chose.
    mtp: detached trains the MTP modules on sampled answers without gradients into the main model; frozen keeps them.
    validation_samples: answers per prompt of the validation.
    """

    rewards: list[str]
    reward_weights: list[float] | None = None
    reward_seconds: float = 60.0
    normalize: Literal["sum", "each"] = "sum"
    group_size: int = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    updates: int = 1
    variant: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    scale: Literal["group", "none"] = "group"
    clip: tuple[float, float] = (0.2, 0.28)
    beta: float = 0.0
    reference_steps: int | None = None
    replay_routes: bool = False
    mtp: MTP = "detached"
    validation_samples: int = 4

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("grpo.rewards=[]: must name a function, such as my_module:my_reward")
        for name in self.rewards:
            if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name) is None:
                raise ConfigError(f"grpo.rewards={name}: must be module:function")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ConfigError(
                f"grpo.reward_weights={self.reward_weights}: must be {len(self.rewards)} factors, one for each of "
                f"grpo.rewards"
            )
        if self.group_size < 2:
            raise ConfigError(
                f"grpo.group_size={self.group_size}: must be at least 2, or no answer has another beside it"
            )
        for name in ("max_new_tokens", "updates", "validation_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"grpo.{name}={getattr(self, name)}: must be at least 1")
        for name in ("temperature", "reward_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"grpo.{name}={getattr(self, name)}: must be above 0")
        if min(self.clip) <= 0:
            raise ConfigError(f"grpo.clip={list(self.clip)}: must be two numbers above 0")
        if self.beta < 0:
            raise ConfigError(f"grpo.beta={self.beta}: must be at least 0")
        if self.reference_steps is not None and (self.reference_steps < 1 or not self.beta):
            raise ConfigError(
                f"grpo.reference_steps={self.reference_steps}: must be at least 1, with grpo.beta above 0, or null"
            )

    @property
    def weights(self) -> list[float]:
        """The factor of each reward function."""
        return [1.0] * len(self.rewards) if self.reward_weights is None else self.reward_weights
