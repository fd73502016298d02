"""Four steps of the small presets, to the digit: a refactoring that moves a number shows here, before in a run.

The numbers come from this code and prove nothing by themselves; the other tests hold it against independent ones.
"""

import pytest

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.training.optimizer import build_optimizer
from tests.model.small import small_batch, total_loss

GOLDEN = {  # the loss with MTP and balance, at each step
    "nano": [10.5518, 10.0472, 9.5132, 9.2370],
    "laptop": [12.4062, 9.9513, 8.0617, 6.5194],
}


@pytest.mark.parametrize("preset", GOLDEN)
def test_losses_are_those_of_yesterday(preset: str):
    config = check(compose([preset]).tree)
    model = Transformer(config.model)
    model.init_weights(seed=1)
    optimizer = build_optimizer(model, config.optimizer)
    batch = small_batch(config.model, B=2, T=16)
    found = []
    for _ in range(4):
        loss = total_loss(model.losses(*batch), batch.targets)
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found == pytest.approx(GOLDEN[preset], rel=1e-3)  # Adam turns rounding into signs
