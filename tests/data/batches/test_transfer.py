"""What of a batch stays on the host."""

from typing import Any

import torch

from dsv3_lightning.data.batches.module import TextDataModule


def test_numbers_of_documents_stay_on_the_host() -> None:
    """There their lengths are read for every batch; on a GPU that would wait for all work before."""
    names = ("tokens", "documents", "step_documents", "step_tokens")
    batch = {name: torch.zeros(2, 5, dtype=torch.int64) for name in names}
    data: Any = TextDataModule.__new__(TextDataModule)
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert {name: tensor.device.type for name, tensor in moved.items()} == {
        "tokens": "meta", "step_tokens": "meta", "documents": "cpu", "step_documents": "cpu",
    }  # fmt: skip
