"""`dsv3 generate`: continues a prompt with the model of a run, or of a Hugging Face folder."""

import functools
import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor

from dsv3_lightning.callbacks.checkpoint import best_files, step_files
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.data.files import native
from dsv3_lightning.data.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.folder import HubFolder
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.decoder import check_lengths
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.speculative import Drafts, check_depth, speculate
from dsv3_lightning.inference.text import TextStream, encode
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.transformer import Transformer, fill
from dsv3_lightning.training.checkpoint_io import newest_good, read_checkpoint


def generate(
    checkpoint: str,
    prompt: list[str],
    draft: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    stop: list[str],
    seed: int,
) -> int:
    """Prints each prompt and, as it comes, its continuation; several are written together, or with guesses in turn."""
    sampling = Sampling(temperature, top_k, top_p, min_p)
    model, tokenizer = load(checkpoint)
    prompts = [[tokenizer.bos_id, *encode(tokenizer, text)] for text in prompt]
    check_lengths([len(ids) for ids in prompts], max_new_tokens, model.config.max_position_embeddings)
    if draft:
        check_depth(model, draft)
    texts, ends = Texts(tokenizer, prompt, tuple(stop)), {tokenizer.eos_id}
    if not draft:
        decode(model, prompts, max_new_tokens, sampling, ends, seed, texts.push)
        for _ in prompts:
            texts.finish()
        return 0
    counts = Drafts([0] * draft, [0] * draft)
    for number, ids in enumerate(prompts):
        show = functools.partial(texts.push, number)
        counts += speculate(model, ids, max_new_tokens, sampling, ends, seed, draft, show)[1]
        texts.finish()
    print(told(counts), file=sys.stderr)
    return 0


class Texts:
    """Several texts on one terminal: one as it comes, the next when it has ended."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[str], stop: tuple[str, ...]) -> None:
        self.streams = [TextStream(tokenizer, stop) for _ in prompts]
        self.held, self.current = list(prompts), 0
        self.show()

    def push(self, number: int, token: int) -> bool:
        """Whether a stop string has ended the text."""
        self.held[number] += self.streams[number].push(token)
        self.show()
        return self.streams[number].stopped

    def finish(self) -> None:
        """Of the current text."""
        self.held[self.current] += self.streams[self.current].finish() + "\n"
        self.show()
        self.current += 1
        if self.current < len(self.held):
            print("---")
            self.show()

    def show(self) -> None:
        print(self.held[self.current], end="", flush=True)
        self.held[self.current] = ""


def told(counts: Drafts) -> str:
    """What became of the guesses."""
    shares = ", ".join("none" if share is None else f"{share:.0%}" for share in counts.acceptance())
    tokens = counts.passes + sum(counts.kept)
    return f"dsv3: guesses kept, by depth: {shares}; {tokens / counts.passes:.2f} tokens per pass of the main model"


def load(word: str) -> tuple[Transformer, Tokenizer]:
    """A run's model, or that of a Hugging Face folder, fp32 on CPU, with its tokenizer."""
    given = native(word)
    if (given / "config.json").is_file():
        return load_hub_folder(given), Tokenizer.from_file(given)
    path, folder = find_checkpoint(given)
    config = stored_config(folder)
    return load_model(path, config.model), Tokenizer.from_file(folder)


def stored_config(folder: Path) -> Config:
    """The settings that a run was made with."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{file}: missing, so {folder} is not a run's folder")
    return check(yaml.safe_load(file.read_text(encoding="utf-8")))


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
    return fill_model(config, read_weights(path), path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint, by the model's own names, left in the file until they are used."""
    state = read_checkpoint(path, mmap=True)["state_dict"]
    return {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}


def fill_model(config: ModelConfig, weights: dict[str, Tensor], path: Path) -> Transformer:
    model = empty_model(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    return model.eval()


def load_hub_folder(path: Path) -> Transformer:
    folder = HubFolder(path)
    model = empty_model(folder.config)
    folder.load_into(model, fill)
    return model.eval()


def empty_model(config: ModelConfig) -> Transformer:
    """fp32, on CPU, its memory not written yet."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model
