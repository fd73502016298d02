"""Config: a run's checked settings by section. Imports no torch, so that errors appear in the first second."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dsv3_lightning.common.paths import NAME_BYTES, PathText, expand_home
from dsv3_lightning.common.typed import build
from dsv3_lightning.common.wording import show
from dsv3_lightning.config.checks import (
    check_callbacks,
    check_halves,
    check_stages,
    check_strategy,
    check_together,
    check_trainer,
)
from dsv3_lightning.config.tuning import check_tuning
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.training.config import ComputeConfig, LossConfig, OptimizerConfig
from dsv3_lightning.training.tuning import DPOConfig, GRPOConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The location of a run and how it starts. Raises ConfigError.

    The run's folder is dir/name. seed: for the initial weights and the order of the samples.
    resume: `auto` continues from the newest good checkpoint in the folder if there is one; False only starts new runs;
    a path continues from that checkpoint.
    """

    name: str
    dir: PathText
    seed: int
    resume: Literal["auto", False] | PathText

    def __post_init__(self) -> None:
        if self.name.strip() != self.name or self.name in ("", ".", "..") or set(self.name) & set("/\\\0\n"):
            raise ConfigError(f"run.name={self.name!r}: must be a folder's name, without / or \\ or spaces around it")
        if len(self.name.encode("utf-8", "surrogatepass")) > NAME_BYTES:
            raise ConfigError(f"run.name={show(self.name)}: a folder's name has at most {NAME_BYTES} bytes")
        if not 0 <= self.seed < 2**32:  # the range of numpy's generators
            raise ConfigError(f"run.seed={self.seed}: must be between 0 and 2^32 - 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's settings. trainer: Lightning's Trainer arguments. strategy: a name, one of Lightning's or of ours
    (parallel/mesh.py), or a block with `kind` (ours) or `class_path` (any).

    init_from: a run's folder or a Hugging Face folder with the initial weights; None: they are random.
    dpo, grpo: preference or reinforcement learning in place of the language-model loss; None: neither.
    callbacks: by name, None if switched off.
    """

    run: RunConfig
    init_from: PathText | None
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    compute: ComputeConfig
    trainer: dict[str, Any]
    strategy: str | dict[str, Any]
    callbacks: dict[str, dict[str, Any] | None]
    dpo: DPOConfig | None
    grpo: GRPOConfig | None


def check(tree: dict[str, Any], mesh: bool = True) -> Config:
    """The typed settings of a composed tree. Raises ConfigError with the key, the value and what is valid.

    mesh: whether the strategy's mesh must fit trainer.devices; a plan for other GPUs checks that itself.
    """
    trainer = tree.get("trainer")
    config = build(Config, {**tree, "trainer": check_trainer(trainer)} if isinstance(trainer, dict) else tree)
    if config.init_from is not None and config.data.tokenizer is None:  # the weights depend on their tokenizer
        config = replace(config, data=replace(config.data, tokenizer=config.init_from))
    others = {name: expand_home(getattr(config, name)) for name in ("trainer", "strategy", "callbacks")}
    config = replace(config, **others)
    config = replace(config, callbacks=as_lists(check_callbacks(config.callbacks)))
    if mesh:
        check_strategy(config.strategy, config.trainer, config.model)
        check_halves(config.strategy, config.data, config.trainer)
    pipelined = check_stages(config.strategy, config.trainer, config.model, config.data)
    check_together(config.model, config.data, config.loss, config.trainer, config.callbacks, pipelined)
    check_tuning(config.dpo, config.grpo, config.data, config.loss, config.callbacks, pipelined)
    return config


def to_tree(config: Config) -> dict[str, Any]:
    """The settings in effect, with defaults, as dicts, lists and scalars; `check` turns them into an equal Config."""
    return as_lists(asdict(config))


def as_lists(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: as_lists(value) for key, value in node.items()}
    return [as_lists(value) for value in node] if isinstance(node, list | tuple) else node
