"""What a run starts from: the weights of another run, or of a Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsv3_lightning.common.paths import user_path
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.folder import HubFolder, WeightSource
from dsv3_lightning.hub.layout import Stored, from_disk, layout, permutation
from dsv3_lightning.model.init import Fill
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.checkpoints.one_file import is_checkpoint
from dsv3_lightning.runs.models import best_checkpoint, part_reader, run_of
from dsv3_lightning.runs.record import stored_config


def weight_source(path: str | Path) -> WeightSource:
    """Raises ConfigError where there is neither a run's folder nor a Hugging Face folder."""
    given = user_path(path)
    if is_checkpoint(given):
        run = run_of(given)
        instead = "a run's folder" if run is None else f"its run's folder, {run}"
        raise ConfigError(f"init_from={path}: is a checkpoint; give {instead}, whose best checkpoint is taken")
    is_run = (given / "config.yaml").is_file() and not (given / "config.json").exists()
    return RunWeights(given) if is_run else HubFolder(given)


class RunWeights:
    """A run's checkpoint with the lowest validation loss, else the newest. Raises ConfigError, here and in methods."""

    def __init__(self, path: Path) -> None:
        self.path, self.config = path, stored_config(path).model
        self.checkpoint = best_checkpoint(path)
        self.read = part_reader(self.checkpoint)
        self.notes: list[str] = [f"{path}: taken is {self.checkpoint.path.name}"]

    def audit(self) -> None:
        """Nothing to do: a checkpoint is what its run's settings say, and reading names a part that is absent."""

    @torch.no_grad()
    def load_into(self, model: Transformer, fill: Fill) -> None:
        """Fills the parameters and expert biases; fill(parameter, expert, draw) writes a matrix.

        Modules beyond the model's MTP depth are left out, and those beyond the run's stay as they are.
        """
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        permute = permutation(self.config.rope_interleave, model.config.rope_interleave)
        parts = {(stored.name, stored.expert): stored for stored in layout(self.config) if not stored.copy}
        for (name, expert), stored in parts.items():
            if name in own:
                fill(own[name], expert, self.reading(stored, permute))

    def reading(self, stored: Stored, permute: str | None) -> Callable[[], Tensor]:
        def draw() -> Tensor:
            tensor = self.read(stored.name, stored.expert)
            if stored.expert is not None:
                return tensor
            return from_disk([stored], [tensor], self.config.qk_rope_head_dim, permute)

        return draw
