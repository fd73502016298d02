"""Wrong settings of trainer, strategy and callbacks are reported before torch is imported; tables equal classes."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from dsv3_lightning import callbacks
from dsv3_lightning.callbacks.settings import CALLBACKS, CLASSES
from dsv3_lightning.common.wording import either
from dsv3_lightning.config.checks import ELSEWHERE, TRAINER
from dsv3_lightning.config.lightning_names import ACCELERATORS, STRATEGIES, TRAINER_MORE
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.mesh import KINDS
from tests.conftest import ROOT

CASES = {  # what is given after `nano` -> the line
    "callbacks.checkpoint.kep=3": "callbacks.checkpoint.kep: no such key; did you mean callbacks.checkpoint.keep?",
    "callbacks.checkpoint.keep=two": 'callbacks.checkpoint.keep="two": must be a whole number',
    "callbacks.checkpoint.keep=0": "callbacks.checkpoint.keep=0: must be at least 1",
    "callbacks.expert_bias.speed=-1": "callbacks.expert_bias.speed=-1.0: must be at least 0",
    "callbacks.expert_bias.speed='1e-3'": 'callbacks.expert_bias.speed="1e-3": must be a number',
    "callbacks.expert_bias.rule=sing": 'callbacks.expert_bias.rule="sing": must be sign or proportional',
    "callbacks.expert_bias.centered=yes": 'callbacks.expert_bias.centered="yes": must be true or false',
    "callbacks.expert_bias.schedule=5": "callbacks.expert_bias.schedule=5: must be a list, of a list each",
    "callbacks.mtp_weight.by=epochs": "callbacks.mtp_weight.by=epochs: must be share, steps or tokens",
    "callbacks.sample_text.prompts=[1]": "callbacks.sample_text.prompts[0]=1: must be text, "
    "in quotes where it reads like a number",
    "callbacks.sample_text.temperature=-1": "callbacks.sample_text.temperature=-1.0: must be at least 0 (0 is greedy)",
    "callbacks.throughput.peak_flops=0": "callbacks.throughput.peak_flops=0.0: must be above 0, or null to measure it",
    "callbacks.weight_average={decay: 1}": "callbacks.weight_average.decay=1.0: must be at least 0 and below 1",
    "callbacks.weight_average={}": "callbacks.weight_average.decay: missing",
    "callbacks.progress={every: 1}": "callbacks.progress.every: no such key; valid: none",
    "callbacks.own={class_path: Thing}": 'callbacks.own.class_path="Thing": must be the full name of a class, '
    "such as package.module.Class",
    "callbacks.own={class_path: a.B, speed: 1}": "callbacks.own.speed: not valid next to class_path; "
    "arguments go under init_args",
    "trainer.limit_val_batch=1": "trainer.limit_val_batch: no such argument of Trainer; "
    "did you mean limit_val_batches?",
    "trainer.detect_anomaly=1": "trainer.detect_anomaly=1: must be true or false",
    "trainer.deterministic=wran": 'trainer.deterministic="wran": must be true or false, warn or null',
    "trainer.gradient_clip_algorithm=nrom": 'trainer.gradient_clip_algorithm="nrom": must be norm, value or null',
    "trainer.accelerator=cdua": 'trainer.accelerator="cdua": must be auto, cpu, gpu, cuda, mps or tpu',
    "trainer.devices=0": "trainer.devices=0: must be auto, -1 for all, a number from 1 on, "
    "or a list of different device numbers",
    "trainer.max_time=1:30": 'trainer.max_time="1:30": must be DD:HH:MM:SS, such as 00:12:00:00',
    "trainer.max_time={minute: 5}": "trainer.max_time.minute: no such unit of time; did you mean minutes?",
    "trainer.max_steps=1:30": 'trainer.max_steps="1:30": must be a whole number',
    "strategy=dpp": 'strategy="dpp": no such strategy; did you mean ddp?',
    "strategy={kind: fsdp}": f'strategy.kind="fsdp": must be {either(KINDS)}',
    "strategy={kind: fsdp2, prefetch: -1}": "strategy.prefetch=-1: must be at least 0",
    "strategy={kind: fsdp2, prefech: 1}": "strategy.prefech: no such key; did you mean strategy.prefetch?",
    "strategy={kind: fsdp2, pipeline_parallel: 2, stages: [1, 2]}": "strategy.stages=[1, 2]: has 2 chunks; "
    "zbv on 2 ranks has 4",
    "strategy={kind: fsdp2, pipeline_parallel: 2}": "strategy.pipeline_parallel=2: does not divide 1 processes; use 1",
    "run.resume=gone/step=3.ckpt": "run.resume={here}/gone/step=3.ckpt: no such checkpoint",
}
SCRIPT = """
import sys
from dsv3_lightning.cli import main
for verb in ("validate", "run"):
    for override in sys.argv[1:]:
        assert main([verb, "nano", override]) == 2, override
assert main(["validate", "nano"]) == 0
print(*{name.split(".")[0] for name in sys.modules} & {"torch", "lightning", "jsonargparse", "numpy"}, file=sys.stderr)
"""


@pytest.mark.slow
def test_wrong_settings_are_told_in_one_line_without_torch(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *CASES],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    *lines, imported = done.stderr.split("\n")[:-1]
    assert done.returncode == 0, done.stderr
    expected = [f"dsv3: error: {line.format(here=tmp_path) if '{here}' in line else line}" for line in CASES.values()]
    assert lines == expected * 2
    assert imported == ""
    assert not list(tmp_path.iterdir())


def parameters(cls: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callbacks_settings_are_its_constructors_arguments(name: str):
    cls = getattr(callbacks, CLASSES[name])
    assert parameters(cls) == parameters(CALLBACKS[name])
    hints = get_type_hints(cls.__init__)
    assert {key: hints[key] for key in parameters(cls)} == get_type_hints(CALLBACKS[name])


def test_the_table_names_what_the_package_has():
    assert sorted(CLASSES.values()) == callbacks.__all__
    for name, class_name in CLASSES.items():
        assert getattr(callbacks, class_name).__module__ == f"dsv3_lightning.callbacks.{name}"
    with pytest.raises(AttributeError):
        callbacks.Nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("expert_bias", {"speed": -1.0}), ("expert_bias", {"schedule": [[0.5, 1.0]]}), ("expert_bias", {"by": "x"}),
        ("balance_factor", {"schedule": [[0, -1]]}), ("mtp_weight", {"schedule": []}),
        ("skewed_start", {"strength": 0}),
        ("router_monitor", {"every_n_steps": 0}), ("weight_average", {"decay": 1.0}),
        ("throughput", {"peak_flops": 0.0}), ("sample_text", {"every_n_steps": 0}), ("sample_text", {"prompts": []}),
        ("sample_text", {"max_new_tokens": 0}), ("sample_text", {"temperature": -0.1}),
        ("checkpoint", {"every_n_steps": 0}), ("checkpoint", {"keep": 0}), ("checkpoint", {"keep_best": -1}),
    ],
)  # fmt: skip
def test_a_constructor_refuses_what_its_settings_refuse(name: str, arguments: dict[str, Any]):
    with pytest.raises(ConfigError) as early:
        CALLBACKS[name](**arguments)
    with pytest.raises(ConfigError) as late:
        getattr(callbacks, CLASSES[name])(**arguments)
    assert str(early.value) == str(late.value)


def test_the_tables_of_lightnings_names_are_lightnings():
    ours = {*KINDS, "auto"}  # registered by parallel/strategy.py
    assert set(StrategyRegistry.available_strategies()) - ours == set(STRATEGIES) - ours
    assert set(AcceleratorRegistry.available_accelerators()) == set(ACCELERATORS) - {"auto", "gpu"}
    assert set(inspect.signature(Trainer).parameters) == {*TRAINER, *TRAINER_MORE, *ELSEWHERE}
