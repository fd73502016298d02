"""Every balance loss gives the same run however a step is spread over micro-batches and processes."""

import pytest
import torch

from dsv3_lightning.model.balance_table import BALANCE_LOSSES
from tests.runs.compare import assert_same_curves, assert_same_weights

FACTORS = {"batch": 0.2, "switch": 0.2, "z": 0.01}  # of the others 0.1
ALL = (
    f"loss.balance=[{','.join(BALANCE_LOSSES)}]",
    f"loss.balance_factor=[{','.join(str(FACTORS.get(name, 0.1)) for name in BALANCE_LOSSES)}]",
    "callbacks.balance_factor.schedule=[[0.0,1.0],[1.0,0.0,linear]]",
)
SMALL = ("trainer.max_steps=12", "trainer.val_check_interval=12", "trainer.limit_val_batches=1")


def test_micro_batches_recomputation_and_processes_give_the_same_numbers(nano):
    one = nano.run("one", *ALL, *SMALL)
    curves = one.scalars()
    assert {tag for tag in curves if tag.startswith("loss/balance_")} == {
        f"loss/balance_{name}" for name in BALANCE_LOSSES
    }
    assert curves["balance/factor"][1] == pytest.approx([1 - step / 12 for step in range(12)])
    four = nano.run("four", *ALL, *SMALL, "trainer.accumulate_grad_batches=4", "compute.activation_checkpointing=full")
    assert_same_curves(one, four, 1e-5)
    assert_same_weights(one, four, 12)
    two = nano.command("two", *ALL, *SMALL, "trainer.devices=2", "trainer.accumulate_grad_batches=2")
    assert two.code == 0, two.output
    assert_same_curves(one, two, 1e-5)
    assert_same_weights(one, two, 12)


def test_counting_first_takes_no_gradient_away_in_mixed_precision(nano):
    """Autocast keeps the weights that it cast, and those of a pass without gradient have none."""
    heavy = (
        "loss.balance=batch",
        "loss.balance_factor=1.0",
        "trainer.precision=bf16-mixed",
        *SMALL,
        "trainer.max_steps=3",
    )
    one = nano.run("one", *heavy)
    four = nano.run("four", *heavy, "trainer.accumulate_grad_batches=4")
    norms = [torch.tensor(run.scalars()["optimizer/grad_norm"][1]) for run in (one, four)]
    torch.testing.assert_close(norms[0], norms[1], rtol=0.02, atol=0)


def test_a_strong_balance_loss_balances_and_none_does_not(nano):
    longer = ("trainer.max_steps=60", "trainer.val_check_interval=60", "callbacks.expert_bias=null")
    none = nano.run("none", *longer, "loss.balance=none")
    batch = nano.run("batch", *longer, "loss.balance=batch", "loss.balance_factor=0.1")
    assert "loss/balance" not in none.scalars() and batch.scalars()["loss/balance"][1][-1] > 0
    vio = [sum(run.scalars()["balance/max_vio"][1][-10:]) / 10 for run in (none, batch)]
    assert vio[1] < vio[0] / 2
