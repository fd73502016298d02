"""Micro-batches of pairs and of prompts, from lines in tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dsv3_lightning.data.batches.dataset import IGNORE, targets_of
from dsv3_lightning.data.batches.sampling import MicroBatch
from dsv3_lightning.data.tuning.lines import Lines


def rows_of(
    prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], mtp_depth: int, pad_id: int
) -> dict[str, Tensor]:
    """tokens and mask [B, S], targets [B, P, T] of prompts with their answers, a sequence each, padded on the right.

    Only the answers' tokens are targets. T is that of the longest sequence, and at least 1.
    """
    T = max(1, *(len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True)))
    S = T + 1 + mtp_depth
    tokens = np.full((len(prompts), S), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), S), dtype=bool)
    starts = np.full((len(prompts), S), S, dtype=np.int32)  # beyond every position: what nothing predicts
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        end = len(prompt) + len(answer)
        tokens[row, :end] = np.concatenate((prompt, answer))
        mask[row, :end] = True
        starts[row, len(prompt) : end] = 0
    targets = targets_of(tokens, starts, T)
    return {name: torch.from_numpy(array) for name, array in (("tokens", tokens), ("mask", mask), ("targets", targets))}


def count_targets(prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], mtp_depth: int) -> np.ndarray:
    """The number of targets of each head in `rows_of` of these, int64 [P]."""
    counts = np.zeros(1 + mtp_depth, dtype=np.int64)
    for prompt, answer in zip(prompts, answers, strict=True):
        for k in range(1 + mtp_depth):  # module k predicts nothing before position 1 + k
            counts[k] += max(0, len(answer) - max(0, 1 + k - len(prompt)))
    return counts


class PairDataset(Dataset[dict[str, Tensor]]):
    """dataset[micro_batch] holds 2b sequences of b pairs: all chosen answers, then all rejected ones in the same order.

    tokens, mask, targets: as in `rows_of`; MTP modules have no targets in rejected answers. sample_ids [b]: the pair's
    number, -1 for none, whose sequences are padding. target_counts [P], in the first micro-batch of a training step.
    """

    def __init__(self, lines: Lines, mtp_depth: int, pad_id: int) -> None:
        self.lines, self.mtp_depth, self.pad_id = lines, mtp_depth, pad_id

    def __len__(self) -> int:
        return len(self.lines.bounds)

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        samples, of_step, _ = micro_batch
        prompts, chosen, rejected = self.parts(samples)
        batch = rows_of(prompts * 2, [*chosen, *rejected], self.mtp_depth, self.pad_id)
        batch["targets"][len(samples) :, 1:] = IGNORE
        batch["sample_ids"] = torch.from_numpy(samples)
        if of_step is not None:
            prompts, chosen, rejected = self.parts(of_step)
            counts = count_targets(prompts, chosen, self.mtp_depth)
            counts[0] += count_targets(prompts, rejected, 0)[0]
            batch["target_counts"] = torch.from_numpy(counts)
        return batch

    def parts(self, samples: np.ndarray) -> list[list[np.ndarray]]:
        nothing = [self.lines.tokens[:0]] * 3
        found = [self.lines.parts(number) if number >= 0 else nothing for number in samples]
        return [list(parts) for parts in zip(*found, strict=True)]


class PromptDataset(Dataset[dict[str, Tensor]]):
    """dataset[micro_batch] holds the numbers of its prompts, `sample_ids` [b]; answers are still to be sampled."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines.bounds)

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Any]:
        return {"sample_ids": torch.from_numpy(micro_batch.samples)}
