"""Runs held against each other: curves and weights."""

import pytest
import torch

from tests.conftest import Run


def assert_same_curves(expected: Run, actual: Run, rtol: float, after: int = 0) -> None:
    """Every scalar but the speeds, at the same steps above `after`: a run may begin with a validation at that step."""
    one, other = expected.scalars(), actual.scalars()
    bubbles = {"pipeline/bubble_share"}  # of a pipeline alone
    assert one.keys() - bubbles == other.keys() - bubbles
    for tag, (steps, values) in one.items():
        # a micro-batch's own is its size's
        if not tag.startswith(("throughput/", "pipeline/", "balance/max_vio_micro")):
            kept, others = (
                [(step, value) for step, value in zip(*curve, strict=True) if step > after]
                for curve in ((steps, values), other[tag])
            )
            assert [step for step, _ in others] == [step for step, _ in kept], f"{tag} is logged at other steps"
            # A near-tie in a router that rounding decides moves one token: 1e-4 of a norm, nothing of a mean loss.
            near = max(rtol, 1e-3) if rtol and tag == "optimizer/grad_norm" else rtol
            assert [value for _, value in others] == pytest.approx([value for _, value in kept], rel=near, abs=1e-7), (
                tag
            )


def assert_same_weights(expected: Run, actual: Run, step: int, exact: bool = False) -> None:
    """Expert biases to the bit; the others to the bit, or as near as Adam leaves what rounding made different."""
    one, other = expected.weights(step), actual.weights(step)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if exact or name.endswith("expert_bias"):
            assert torch.equal(other[name], value), name
        else:
            torch.testing.assert_close(
                other[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
