"""A batch against its definition, token by token."""

from typing import Any

import numpy as np
import pytest
import torch

from dsv3_lightning.data.batches.dataset import PackedDataset
from dsv3_lightning.data.batches.packing import pack
from dsv3_lightning.data.batches.sampling import MicroBatch

PAD = 2


class Tokens:
    """A token file in memory: token i of the corpus is 10 + i."""

    def __init__(self, lengths: list[int]) -> None:
        self.tokens = np.arange(10, 10 + sum(lengths)).astype(np.uint16)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])


def dataset_of(
    lengths: list[int],
    length: int,
    depth: int,
    mask_ends: bool,
    sizes: bool = False,
    loss_spans: Any = None,
    isolate: bool = False,
) -> PackedDataset:
    file = Tokens(lengths)
    per_token = np.arange(10 + sum(lengths)) % 7 if sizes else None
    index = pack(file.offsets, length, depth, mask_ends, loss_spans)
    return PackedDataset(file, index, length, depth, PAD, mask_ends, isolate, loss_spans, per_token)  # type: ignore[arg-type]


def micro_batch(*samples: int) -> MicroBatch:
    return MicroBatch(np.array(samples))


@pytest.mark.parametrize("talk", [False, True])
@pytest.mark.parametrize("mask_ends", [False, True])
@pytest.mark.parametrize(("length", "depth"), [(8, 0), (8, 1), (8, 3), (5, 4), (1, 0), (64, 2)])
def test_a_batch_is_what_its_definition_says(length: int, depth: int, mask_ends: bool, talk: bool) -> None:
    rng = np.random.default_rng(length * 10 + depth)
    lengths = [int(size) for size in [*rng.integers(1, 12, 30), *rng.integers(1, 60, 10), depth or 1, depth + 1]]
    bounds = np.sort(rng.permutation(sum(lengths) - 1)[:60]) + 1 if talk else np.array([0, sum(lengths)])
    learned = {place for begin, end in bounds.reshape(-1, 2) for place in range(begin, end)}
    dataset = dataset_of(
        lengths, length, depth, mask_ends, sizes=True, loss_spans=bounds if talk else None, isolate=mask_ends
    )
    ends = np.cumsum(lengths)
    chosen = rng.permutation(len(dataset))
    batch = dataset[MicroBatch(chosen)]
    assert batch["tokens"].shape == batch["mask"].shape == (len(chosen), length + 1 + depth)
    assert batch["targets"].shape == (len(chosen), 1 + depth, length)
    for row, sample in enumerate(chosen):
        tokens, document, begins = [], [], []  # of each place: the token, its document, whether its piece began inside
        for piece in range(dataset.index.samples[sample], dataset.index.samples[sample + 1]):
            start, size = dataset.index.starts[piece], dataset.index.lengths[piece]
            tokens += [10 + int(token) for token in range(start, start + size)]
            document += [int(np.searchsorted(ends, start, "right"))] * size
            begins += [len(tokens) - int(size) if start not in {0, *ends} else 0] * size
        filled = len(tokens)
        if mask_ends:
            places = range(length + 1 + depth)
            own = [[i < filled and j < filled and document[i] == document[j] for j in places] for i in places]
            padding = [[i >= filled and j >= filled for j in places] for i in places]
            same = batch["documents"][row, :, None] == batch["documents"][row]
            assert torch.equal(same, torch.tensor(own) | torch.tensor(padding))
        assert batch["tokens"][row].tolist() == tokens + [PAD] * (length + 1 + depth - filled)
        assert batch["mask"][row].tolist() == [place < filled for place in range(length + 1 + depth)]
        sizes = 0
        for k in range(1 + depth):
            for i in range(length):
                j = i + 1 + k
                valid = j < filled and i >= begins[j] and not (mask_ends and document[i] != document[j])
                valid = valid and tokens[j] - 10 in learned
                assert batch["targets"][row, k, i] == (tokens[j] if valid else -100), (sample, k, i)
                sizes += tokens[j] % 7 if valid and k == 0 else 0
        assert batch["target_bytes"][row] == sizes
        assert dataset.index.target_counts[sample].tolist() == (batch["targets"][row] != -100).sum(1).tolist()


def test_types_and_what_is_passed_on() -> None:
    dataset = dataset_of([20, 3], 8, 1, False)
    batch = dataset[micro_batch(1, 0)]
    assert set(batch) == {"tokens", "mask", "targets", "sample_ids"}
    first = dataset[MicroBatch(np.array([1, 0]), np.array([1, 0, 0, 1]))]
    targets = (dataset[micro_batch(1, 0, 0, 1)]["targets"] != -100).sum((0, 2))  # a sample twice counts twice
    assert set(first) == {*batch, "target_counts"} and torch.equal(first["target_counts"], targets)
    assert batch["sample_ids"].tolist() == [1, 0]
    assert batch.pop("mask").dtype == torch.bool
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_no_sample_is_all_padding() -> None:
    dataset = dataset_of([20, 3], 8, 1, False, sizes=True)
    batch = dataset[micro_batch(-1, 0, -1)]
    alone = dataset[micro_batch(0)]
    for row in (0, 2):
        assert (batch["tokens"][row] == PAD).all() and not batch["mask"][row].any()
        assert (batch["targets"][row] == -100).all() and batch["target_bytes"][row] == 0
    assert torch.equal(batch["targets"][1], alone["targets"][0]) and batch["sample_ids"].tolist() == [-1, 0, -1]
    assert not dataset[micro_batch(-1)]["mask"].any()


@pytest.mark.parametrize("size", [1, 2, 3])  # D tokens, BOS and EOS included or not
def test_documents_as_short_as_the_depth_work(size: int) -> None:
    batch = dataset_of([size], 8, 2, False)[micro_batch(0)]
    assert (batch["targets"] != -100).sum((0, 2)).tolist() == [size - 1, max(size - 2, 0), 0]
