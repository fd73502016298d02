"""Settings stored by earlier versions: what they lack counts as switched off, for all that read them."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv3_lightning.config.compose import compose, to_yaml
from dsv3_lightning.config.schema import check, to_tree
from dsv3_lightning.config.stored import OFF, read_stored
from dsv3_lightning.runs.changes import ALWAYS, rule
from dsv3_lightning.runs.changes import differences as all_differences

FIRST = Path(__file__).with_name("stored_0.1.0.yaml")  # the config.yaml of a run of nano, made by version 0.1.0
SAME = ["run.dir=/runs", "data.cache_dir=/runs/data", "compute.compile=false", "compute.compile_cache=runs/compiled"]


@cache
def composed(*overrides: str) -> dict[str, Any]:
    return to_tree(check(compose(["nano"], [*SAME, *overrides]).tree))


def nano(*overrides: str) -> dict[str, Any]:
    return deepcopy(composed(*overrides))


def differences(stored: dict[str, Any], tree: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of the settings that may not change under a run's own name."""
    return all_differences(stored, tree, lambda key: rule(key).road == ALWAYS)


def test_a_run_of_the_first_version_still_has_the_settings_of_its_preset():
    """Fails when a setting is added without its off value in OFF, or a default changes."""
    assert differences(read_stored(FIRST), nano()) == {}
    assert check(read_stored(FIRST)) == check(nano())


def without(key: str, tree: dict[str, Any]) -> dict[str, Any]:
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        node = node[section]
    del node[name]
    return tree


@pytest.mark.parametrize("key", OFF)
def test_a_setting_that_a_stored_config_lacks_has_its_off_value_and_no_other(tmp_path: Path, key: str):
    path = tmp_path / "config.yaml"
    off = nano()
    node = off
    *sections, name = key.split(".")
    for section in sections:
        node = node[section]
    node[name] = OFF[key]
    path.write_text(to_yaml(without(key, nano())), encoding="utf-8")
    stored = read_stored(path)
    assert stored == off
    assert differences(stored, off) == {}


def test_a_whole_section_that_a_stored_config_lacks_is_off(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(without("compute", nano())), encoding="utf-8")
    assert check(read_stored(path)).compute.activation_checkpointing == "none"
    assert differences(read_stored(path), nano("compute.activation_checkpointing=full")) == {
        "compute.activation_checkpointing": ("none", "full")
    }


def test_a_callback_that_a_stored_config_lacks_stays_off(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(without("callbacks.expert_bias", nano())), encoding="utf-8")
    assert read_stored(path)["callbacks"]["expert_bias"] is None
    assert list(differences(read_stored(path), nano())) == ["callbacks.expert_bias"]


def test_text_is_stored_as_itself(tmp_path: Path):
    """What runs is what is recorded: text like a number, a truth value or an interpolation."""
    prompts = ["1e5", "695e0514", "no", "~", "", "${run.seed}", r"\${a}", "a\nb", "010", "12:30", "实 "]
    tree = nano()
    tree["run"]["name"], tree["callbacks"]["sample_text"]["prompts"] = "12e5", prompts
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(tree), encoding="utf-8")
    assert read_stored(path) == tree == compose([str(path)]).tree
    assert check(read_stored(path)).run.name == "12e5"
