"""The rule of the expert bias by hand, and when it is applied."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dsv3_lightning.callbacks import ExpertBias
from dsv3_lightning.callbacks.expert_bias import bias_step
from dsv3_lightning.errors import ConfigError


class Routers(nn.Module):
    """Anybody's module: two things with an `expert_bias`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.register_buffer("expert_bias", torch.zeros(4))
        self.step_skipped = False

    @property
    def bias(self) -> list[list[float]]:
        return [layer.expert_bias.tolist() for layer in self.layers]


def trainer(step: int, accumulate: int = 1, ranks: int = 1) -> SimpleNamespace:
    """A trainer as the callback sees it; the other ranks count the same."""
    return SimpleNamespace(
        global_step=step, estimated_stepping_batches=10, accumulate_grad_batches=accumulate, is_last_batch=False,
        log_every_n_steps=100, loggers=[],
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value * ranks),
    )  # fmt: skip


def counts(*rows: list[int]) -> dict[str, torch.Tensor]:
    return {"expert_counts": torch.tensor(rows)}


def test_busy_experts_go_down_idle_ones_up_and_fair_ones_stay():
    assert bias_step(torch.tensor([4, 0, 2, 2]), 0.001).tolist() == pytest.approx([-0.001, 0.001, 0.0, 0.0])


def test_the_rule_compares_integers():
    """8 experts share 2^53 + 1 tokens unevenly by one: in fp64 the mean of the counts equals the largest."""
    large = torch.tensor([2**50] * 7 + [2**50 + 1])
    assert bias_step(large, 1.0).tolist() == [1.0] * 7 + [-1.0]


def test_proportional_steps_follow_the_violation_and_centered_ones_keep_the_sum():
    loads = torch.tensor([5, 0, 2, 1])  # mean 2
    assert bias_step(loads, 0.1, "proportional").tolist() == pytest.approx([-0.15, 0.1, 0.0, 0.05])
    assert bias_step(loads, 0.1).tolist() == pytest.approx([-0.1, 0.1, 0.0, 0.1])
    assert bias_step(loads, 0.1, centered=True).tolist() == pytest.approx([-0.125, 0.075, -0.025, 0.075])
    assert bias_step(torch.zeros(4, dtype=torch.int64), 0.1, "proportional", True).tolist() == [0.0] * 4


def test_the_rule_of_the_settings_is_applied():
    module = Routers()
    callback = ExpertBias(speed=1.0, schedule=[[0, 1.0], [2, 0.0, "linear"]], by="steps", rule="proportional")
    for step in (1, 2, 3):
        callback.on_train_batch_end(trainer(step), module, counts([6, 0, 2, 0], [2, 2, 2, 2]), None, step - 1)
    assert module.bias == [[-3.0, 1.5, 0.0, 1.5], [0.0] * 4]  # factors 1, 0.5, 0


def test_micro_batches_are_added_before_the_one_step():
    """Alone, the first micro-batch would move expert 0 down and the second one up again; the sum is fair to it."""
    module, callback = Routers(), ExpertBias(speed=0.5, schedule=[[0.0, 1.0]])
    callback.on_train_batch_end(trainer(0, accumulate=2), module, counts([4, 0, 0, 0], [1, 1, 1, 1]), None, 0)
    assert module.bias == [[0.0] * 4] * 2
    callback.on_train_batch_end(trainer(1, accumulate=2), module, counts([0, 4, 4, 4], [1, 1, 1, 1]), None, 1)
    assert module.bias == [[0.0] * 4] * 2
    callback.on_train_batch_end(trainer(1, accumulate=2), module, counts([0, 0, 0, 4], [4, 0, 0, 0]), None, 2)
    callback.on_train_batch_end(trainer(2, accumulate=2), module, counts([0, 0, 0, 4], [4, 0, 0, 0]), None, 3)
    assert module.bias == [[0.5, 0.5, 0.5, -0.5], [-0.5, 0.5, 0.5, 0.5]]


def test_the_speed_follows_its_schedule_and_a_skipped_step_moves_nothing():
    module, callback = Routers(), ExpertBias(speed=1.0, schedule=[[0.0, 1.0], [0.5, 0.25], [0.8, 0.0]])
    batch = counts([4, 0, 0, 0], [4, 0, 0, 0])
    seen = []
    for step in range(1, 11):
        module.step_skipped = step == 2
        callback.on_train_batch_end(trainer(step), module, batch, None, step - 1)
        seen.append(module.bias[0][1])
    # the step with number 0 is at share 0, the last one at 0.9
    assert seen == [1.0, 1.0, 2.0, 3.0, 4.0, 4.25, 4.5, 4.75, 4.75, 4.75]


def test_a_bias_in_bf16_is_refused():
    module = Routers().bfloat16()
    with pytest.raises(ConfigError, match="^ExpertBias needs `expert_bias` to be torch.float32; in .*bfloat16$"):
        ExpertBias().on_fit_start(trainer(0), module)


@pytest.mark.parametrize(
    "arguments", [{"speed": -0.1, "schedule": [[0.0, 1.0]]}, {"speed": 0.1, "schedule": [[0.5, 1.0]]}]
)
def test_wrong_settings_are_named(arguments):
    with pytest.raises(ConfigError, match=r"callbacks\.expert_bias\.\w+="):
        ExpertBias(**arguments)
