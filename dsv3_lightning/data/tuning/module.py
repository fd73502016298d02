"""Data modules of pairs and prompts: the samples' order, the position in it and loaders are those of texts."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.batches.sampling import ORDER, order
from dsv3_lightning.data.batches.skips import shifted
from dsv3_lightning.data.text.progress import say
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.data.tuning.datasets import PairDataset, PromptDataset
from dsv3_lightning.data.tuning.lines import Lines
from dsv3_lightning.data.tuning.prepare import prepare_lines, read_split


class LineDataModule(TextDataModule):
    """A TextDataModule whose samples are the lines of jsonl files: pairs of answers, or prompts. Raises ConfigError.

    reserved: as in `prepare_lines`. `data.batch_size` counts pairs or prompts.
    """

    pairs = True
    reserved = 0

    def prepare_tokens(self, tell: Callable[[str], None] = say) -> Path:
        if self._folder is None:
            self._folder = prepare_lines(self.config, self.pairs, self.reserved, self.known, tell)
        return self._folder

    def prepare_data(self) -> None:
        self.prepare_tokens()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_file(self.prepared)
        tokenizer.end_ids |= set(self.manifest["end_ids"])
        return tokenizer

    def lines(self, split: str) -> Lines:
        """The lines of a split, available after `setup`."""
        if split not in self._datasets:
            self._datasets[split] = self._dataset(split)
        found: Lines = self._datasets[split].lines  # type: ignore[attr-defined]
        return found

    def _dataset(self, split: str) -> Any:
        lines = read_split(self.prepared, split)
        return PairDataset(lines, self.mtp_depth, self.tokenizer.pad_id) if self.pairs else PromptDataset(lines)

    def length_note(self) -> str:
        what = "pairs" if self.pairs else "prompts"
        return f"data: the run makes {self.passes(self.max_steps):,.3g} passes over its {self.train_samples:,} {what}"

    def _hash(self) -> str:
        parts = self.manifest["files"]["train.npz"]["sha256"], ORDER, self.config.seed
        return hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).hexdigest()


class PairDataModule(LineDataModule):
    """Pairs of answers; batches are those of `PairDataset`."""


class PromptDataModule(LineDataModule):
    """Prompts; batches are those of `PromptDataset`. max_new_tokens: the longest answer."""

    pairs = False

    def __init__(self, max_new_tokens: int, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.reserved = max_new_tokens

    def of_step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The prompts of a step on this rank: their numbers in the run, and in the data; int64 [accumulate, b]."""
        numbers = shifted(self.position(step), self.skips) + self._layout.numbers()
        return numbers, order(numbers, len(self.lines("train").bounds), self.config.seed)
