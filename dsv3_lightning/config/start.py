"""A check of the run's starting point and of its tasks before torch is imported."""

from pathlib import Path

from dsv3_lightning.common.paths import user_path
from dsv3_lightning.config.schema import Config
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.evaluation.tasks import read_tasks
from dsv3_lightning.parallel.checkpoints.names import step_files


def check_start(config: Config) -> None:
    """Raises ConfigError for a missing checkpoint, unless the run has newer ones of its own, and for bad tasks."""
    if (block := config.callbacks.get("evaluate")) is not None and "tasks" in block:
        try:
            read_tasks([user_path(path) for path in block["tasks"]])
        except ConfigError as error:
            raise ConfigError(f"callbacks.evaluate.tasks: {error}") from error
    wanted = config.run.resume
    if wanted is False or wanted == "auto" or Path(wanted).exists():
        return
    if not step_files(Path(config.run.dir) / config.run.name / "checkpoints"):
        raise ConfigError(f"run.resume={wanted}: no such checkpoint")
