"""The progress line has the numbers of its own step."""

from types import SimpleNamespace

import pytest

from dsv3_lightning.callbacks import Progress


@pytest.mark.parametrize("step, shown", [(60, "step 60/66  loss 2.500  0:00 left"), (66, "step 66/66  0:00 left")])
def test_the_last_step_has_no_loss_of_an_earlier_one(step, shown, capsys):
    """Scalars are logged every tenth step; a checkpoint of step 60 holds those, too."""
    module = SimpleNamespace(scalars={"loss/main": 2.5})
    trainer = SimpleNamespace(
        global_step=60, is_global_zero=True, is_last_batch=False, accumulate_grad_batches=1, log_every_n_steps=10,
        estimated_stepping_batches=66, lightning_module=module, callback_metrics={},
    )  # fmt: skip
    progress = Progress()
    progress.on_train_start(SimpleNamespace(global_step=0), module)
    trainer.global_step = step
    progress.on_train_batch_end(trainer, module, None, None, 0)
    assert capsys.readouterr().out == f"{shown}\n"
