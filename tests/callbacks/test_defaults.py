"""Callbacks made in Python have the settings that base.yaml gives those of a run."""

import inspect
from typing import Any

import yaml

from dsv3_lightning import callbacks
from dsv3_lightning.callbacks.settings import CALLBACKS, CLASSES
from dsv3_lightning.config.compose import PRESETS


def as_lists(value: Any) -> Any:
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def test_constructor_defaults_are_those_of_base_yaml():
    blocks = yaml.safe_load((PRESETS / "base.yaml").read_text(encoding="utf-8"))["callbacks"]
    assert blocks.keys() == CALLBACKS.keys()
    on = {name: block for name, block in blocks.items() if block is not None}
    for name, block in on.items():
        kind = getattr(callbacks, CLASSES[name])
        parameters = inspect.signature(kind).parameters.values()
        assert {p.name: as_lists(p.default) for p in parameters} == block, name
        kind()  # the defaults are valid
