"""Metrics over ranks."""

from tests.parallel.conftest import on_ranks


def test_ranks_add_up_their_sums_without_gathering_them(tmp_path):
    """Numbers as torchmetrics' own, to the bit; the rank's own come back; memory doesn't grow with the ranks."""
    on_ranks(2, tmp_path / "run", ["tests.parallel.metrics_worker"])
