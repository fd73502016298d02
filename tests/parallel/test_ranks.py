"""The helpers that start ranks."""

import pytest

from tests.parallel.conftest import on_ranks


def test_a_rank_that_dies_of_a_signal_prints_its_python_stack(tmp_path):
    with pytest.raises(AssertionError, match="exit codes.*-6") as failure:
        on_ranks(1, tmp_path, ["tests.parallel.dies"])
    assert "Fatal Python error: Aborted" in str(failure.value) and "in give_up" in str(failure.value)
