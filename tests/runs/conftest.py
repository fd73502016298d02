"""What the tests of a file share."""

import pytest
import torch

from tests.conftest import QUIET, Nano


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, data_cache: list[str]) -> Nano:
    """As `nano`, for all tests of a file; each needs run names of its own."""
    torch.set_num_threads(1)
    return Nano(tmp_path_factory.mktemp("runs"), [*data_cache, *QUIET, "callbacks.sample_text=null"])
