"""Micro-batches from the packed index: tokens, the targets of each head, and the number of targets of the step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dsv3_lightning.data.batches.packing import PackedIndex, ranges, segment_start
from dsv3_lightning.data.batches.sampling import MicroBatch
from dsv3_lightning.data.text.store import TokenFile

IGNORE = -100  # torch's ignore_index


class PackedDataset(Dataset[dict[str, Tensor]]):
    """A dataset where dataset[micro_batch] holds the B samples of a micro-batch, gathered at once from the mapped file:

    tokens [B, S] int64, padded with `pad_id`; mask [B, S] bool, False for padding.
    targets [B, P, T] int64: targets[:, p, i] = tokens[:, i + 1 + p], or -100 for none (see `segment_start`).
        If `loss_spans` (of TokenFile) are given, tokens outside of them are no targets.
    target_counts [P] int64, in the first micro-batch of a training step: valid targets of each head in all of the
        step's micro-batches on this rank.
    sample_ids [B] int64: position in the packed index; -1 for a row without a sample, which is all padding.
    documents [B, S] int64, with `isolate`: a number that identifies each token's document; -1 for padding.
    step_tokens, step_mask (step_documents) [accumulate·B, S], with `whole_steps`, in the first of several micro-batches
        of a training step: the same for all of them.
    target_bytes [B] int64, if `bytes_per_token` [V] int64 is given: bytes of text of the main head's targets.
    source int64, if the sampler names the one of all samples.
    origins [B, S] int64, if `origins` [documents] are given: the origin of each token's document; 0 for padding.
    """

    def __init__(
        self,
        file: TokenFile,
        index: PackedIndex,
        sequence_length: int,
        mtp_depth: int,
        pad_id: int,
        mask_document_ends: bool,
        isolate: bool = False,
        loss_spans: np.ndarray | None = None,
        bytes_per_token: np.ndarray | None = None,
        origins: np.ndarray | None = None,
        whole_steps: bool = False,
    ) -> None:
        self.file, self.index, self.pad_id = file, index, pad_id
        self.isolate, self.loss_spans, self.bytes_per_token = isolate, loss_spans, bytes_per_token
        self.sequence_length, self.mtp_depth = sequence_length, mtp_depth
        self.mask_document_ends, self.origins, self.whole_steps = mask_document_ends, origins, whole_steps

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        samples, of_step, source = micro_batch
        tokens, mask, segment_starts = self.gather(samples)
        targets = targets_of(tokens, segment_starts, self.sequence_length)
        batch: dict[str, Any] = {"tokens": tokens, "mask": mask, "targets": targets, "sample_ids": samples}
        if self.isolate:
            batch["documents"] = self.spread(samples, self.numbers_of, -1)
        if of_step is not None:
            batch["target_counts"] = self.index.target_counts[of_step].sum(0)
        if of_step is not None and self.whole_steps and len(of_step) > len(samples):
            batch["step_tokens"], batch["step_mask"], _ = self.gather(of_step)
            if self.isolate:
                batch["step_documents"] = self.spread(of_step, self.numbers_of, -1)
        if self.bytes_per_token is not None:
            main = targets[:, 0]
            batch["target_bytes"] = np.where(main == IGNORE, 0, self.bytes_per_token[np.maximum(main, 0)]).sum(1)
        if source is not None:
            batch["source"] = np.array(source)
        if self.origins is not None:
            batch["origins"] = self.spread(samples, self.origins_of, 0)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def gather(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens int64, mask and segment starts int32 of the samples, each [B, S].

        Padding and tokens outside of the loss spans start beyond every position, so that nothing predicts them.
        """
        length = self.sequence_length + 1 + self.mtp_depth
        tokens = np.full((len(samples), length), self.pad_id, dtype=np.int64)
        limits = np.full((len(samples), length), length, dtype=np.int32)
        positions, piece = self.token_positions(samples)
        sizes = self.index.lengths[piece]
        found = ranges(self.index.starts[piece], sizes)
        tokens.reshape(-1)[positions] = self.file.tokens[found]
        of_pieces = segment_start(self.index.continues[piece], self.index.positions[piece], self.mask_document_ends)
        limits.reshape(-1)[positions] = np.repeat(of_pieces, sizes)
        mask = limits < length
        if self.loss_spans is not None:
            limits.reshape(-1)[positions[np.searchsorted(self.loss_spans, found, "right") % 2 == 0]] = length
        return tokens, mask, limits

    def spread(self, samples: np.ndarray, known: Callable[[np.ndarray], np.ndarray], padding: int) -> np.ndarray:
        """A value per piece, repeated for each of its tokens: int64 [B, S]. known: piece numbers [n] to values [n]."""
        spread = np.full((len(samples), self.sequence_length + 1 + self.mtp_depth), padding, dtype=np.int64)
        positions, piece = self.token_positions(samples)
        spread.reshape(-1)[positions] = np.repeat(known(piece), self.index.lengths[piece])
        return spread

    def numbers_of(self, piece: np.ndarray) -> np.ndarray:
        return piece  # identifies the document: no sample has two pieces of one

    def origins_of(self, piece: np.ndarray) -> np.ndarray:
        assert self.origins is not None
        documents = np.searchsorted(self.file.offsets(), self.index.starts[piece], side="right") - 1
        return self.origins[documents]

    def token_positions(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the samples' tokens in [B·S], piece after piece, and the piece numbers."""
        row, piece = pieces_of(self.index, samples)
        begins = row * (self.sequence_length + 1 + self.mtp_depth) + self.index.positions[piece]
        return ranges(begins, self.index.lengths[piece]), piece


def targets_of(tokens_BS: np.ndarray, starts_BS: np.ndarray, sequence_length: int) -> np.ndarray:
    """Targets [B, P, T]: the token k + 1 positions later; -100 if its segment starts after the predicting one."""
    following = np.lib.stride_tricks.sliding_window_view(tokens_BS, sequence_length, axis=1)[:, 1:]
    start = np.lib.stride_tricks.sliding_window_view(starts_BS, sequence_length, axis=1)[:, 1:]
    return np.where(start <= np.arange(sequence_length, dtype=np.int32), following, IGNORE)


def pieces_of(index: PackedIndex, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and number of each piece of the samples [B], each [n]. A sample of -1 has no pieces."""
    firsts = index.samples[samples]
    counts = np.where(samples < 0, 0, index.samples[samples + 1] - firsts)
    return np.repeat(np.arange(len(samples)), counts), ranges(firsts, counts)
