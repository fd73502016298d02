"""The shipped configs: each passes all checks, and says what its paper says."""

import re
from pathlib import Path

import pytest

from dsv3_lightning.config.compose import compose, presets
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.data.batches.ramp import tokens_of
from dsv3_lightning.planning.flops import training_flop_per_token
from dsv3_lightning.planning.parameters import count_parameters
from tests.conftest import ROOT


def preset(name: str) -> Config:
    return check(compose([name]).tree)


def tokens(config: Config) -> int:
    return tokens_of(config.data, config.trainer["max_steps"])


@pytest.mark.parametrize("name", [name for name in presets() if name not in ("base", "cleaning")])
def test_every_preset_passes_and_is_named_after_its_file(name: str):
    assert preset(name).run.name == name


def test_laptop_stays_within_its_budget():
    config = preset("laptop")
    parameters = count_parameters(config.model)
    assert 10e6 <= parameters.total <= 20e6 and 3e6 <= parameters.active <= 5e6
    per_token = training_flop_per_token(config.model, config.data.sequence_length)
    assert 22e6 <= per_token <= 30e6
    assert per_token * tokens(config) <= 25e12


@pytest.mark.parametrize(
    ("name", "trillions"), [("v3", 14.8), ("v2-lite", 5.7), ("moonlight", 5.7), ("llm-7b", 2), ("llm-67b", 2)]
)
def test_the_large_ones_see_as_many_tokens_as_reported(name: str, trillions: float):
    assert tokens(preset(name)) / 1e12 == pytest.approx(trillions, rel=1e-5)


def test_v3_is_the_reports_recipe():  # §4.2
    config = preset("v3")
    optimizer, callbacks = config.optimizer, config.callbacks
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.warmup_steps) == (
        2.2e-4,
        (0.9, 0.95),
        0.1,
        2000,
    )
    ends = [tokens_of(config.data, round(phase.until * config.trainer["max_steps"])) for phase in optimizer.phases]
    assert ends == pytest.approx([10e12, 14.3e12, 14.633e12, 14.8e12], rel=1e-4)
    assert tokens_of(config.data, 19_414) == pytest.approx(469e9, rel=1e-3)
    assert config.data.batch_ramp is not None and config.data.batch_ramp.start == 3072
    for name, first in (("v3-256", 3072), ("v3-2048", 4096)):  # the batch grows there as well, at the same tokens
        cluster = check(compose([str(ROOT / f"configs/cluster/{name}.yaml")]).tree)
        steps, ramp = cluster.trainer["max_steps"], cluster.data.batch_ramp
        ends = [tokens_of(cluster.data, round(phase.until * steps)) for phase in cluster.optimizer.phases]
        assert ends == pytest.approx([10e12, 14.3e12, 14.633e12, 14.8e12], rel=2e-4)
        assert ramp is not None and (ramp.start, ramp.tokens) == (first, 469e9)
    assert [phase.to * 2.2e-4 for phase in optimizer.phases] == pytest.approx(
        [2.2e-4, 2.2e-5, 2.2e-5, 7.3e-6], rel=1e-3
    )
    assert config.trainer["gradient_clip_val"] == 1.0 and config.loss.balance_factor == 1e-4
    by_sign = {"by": "tokens", "rule": "sign", "centered": False}
    assert callbacks["expert_bias"] == {"speed": 1e-3, "schedule": [[0, 1.0], [14.3e12, 0.0]], **by_sign}
    assert callbacks["mtp_weight"] == {"schedule": [[0, 0.3], [10e12, 0.1]], "by": "tokens"}
    assert callbacks["balance_factor"] == {"schedule": [[0.0, 1.0]], "by": "share"}
    assert config.model.rope_scaling is None and config.model.initializer_range == 0.006


def test_v2_lite_has_v2s_router():
    model = preset("v2-lite").model
    assert (model.scoring_func, model.topk_method, model.norm_topk_prob) == ("softmax", "greedy", False)
    assert preset("v2-lite").callbacks["expert_bias"] is None


def yaml_blocks(page: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", yaml_blocks("balancing.md"))
def test_what_the_page_on_balancing_shows_can_be_run(block: str, tmp_path: Path):
    (tmp_path / "block.yaml").write_text(block)
    check(compose(["nano", str(tmp_path / "block.yaml")]).tree)
