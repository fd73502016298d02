"""`dsv3 generate`: continues a prompt with a run's model."""

from pathlib import Path

import torch
import yaml

from dsv3_lightning.callbacks.checkpoint import best_files, step_files
from dsv3_lightning.config.schema import check
from dsv3_lightning.data.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.generate import generate as continue_prompts
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.training.checkpoint_io import newest_good, read_checkpoint


def generate(checkpoint: str, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> int:
    """Prints the prompt and its continuation. `checkpoint`: a file, or a run's folder (its best, else its newest)."""
    path, folder = find_checkpoint(Path(checkpoint))
    config = folder / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{config}: missing, so {folder} is not a run's folder")
    model = load_model(path, check(yaml.safe_load(config.read_text(encoding="utf-8"))).model)
    tokenizer = Tokenizer.from_file(folder)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    (new,) = continue_prompts(model, [ids], max_new_tokens, temperature, tokenizer.eos_id, seed)
    print(prompt + tokenizer.decode(new))
    return 0


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The checkpoint file and its run's folder."""
    if path.is_file():
        return path, path.resolve().parent.parent
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run folder or checkpoint")
    folder = path / "checkpoints"
    found = newest_good([*(best for _, best in best_files(folder)), *step_files(folder)])
    if found is None:
        raise ConfigError(f"{folder}: holds no checkpoint")
    return found[0], path


def load_model(path: Path, config: ModelConfig) -> Transformer:
    """The model with a checkpoint's weights, fp32, on CPU. Raises ConfigError where keys or shapes differ."""
    weights = {
        key.removeprefix("model."): value
        for key, value in read_checkpoint(path)["state_dict"].items()
        if key.startswith("model.")
    }
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    return model.float().eval()
