"""The YAML dialect: YAML 1.2's core schema, and a writer whose text two other readers take for the same."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from yaml import YAMLError

from dsv3_lightning.common.yaml import dumps, loads
from dsv3_lightning.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [  # YAML 1.2.2 §10.3.2; what YAML 1.1 additionally takes for a number, a boolean or a date
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("-7", -7), ("+7", 7),
        ("1e5", 1e5), ("2E-5", 2e-5), (".5", 0.5), ("5.", 5.0), ("-1.5e+3", -1500.0), ("695e0514", math.inf),
        (".inf", math.inf), ("-.INF", -math.inf), ("Infinity", "Infinity"), ("inf", "inf"), ("nan", "nan"),
        ("12:30", "12:30"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("1_000", "1_000"), ("0b11", "0b11"),
        ("true", True), ("FALSE", False), ("yes", "yes"), ("No", "No"), ("on", "on"), ("OFF", "OFF"), ("y", "y"),
        ("null", None), ("~", None), ("", None), ("NULL", None), ("none", "none"), ("2026-01-02", "2026-01-02"),
        ("=", "="), ("<<", "<<"), ("'010'", "010"), ("!!int '010'", 10), ("!!str 010", "010"),
    ],
)  # fmt: skip
def test_plain_scalars_are_read_by_the_core_schema(text: str, value: Any):
    assert loads(text) == value and type(loads(text)) is type(value)
    assert loads(f"[{text}]" if text else "[~]") == [value]
    assert loads(f"a: {text}") == {"a": value}


def test_not_a_number_is_read():
    assert math.isnan(loads(".nan")) and math.isnan(loads(dumps(math.nan)))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\na: 2", "found duplicate key a"),
        ("1: a\n01: b", "found duplicate key 01"),
        ("a: &x [*x]", "an alias within its own anchor"),
        ("!!python/object:os.system {}", "the tag !!python/object:os.system is not used in settings"),
        ("!!int 1_000", "'1_000' is not of the type int"),
        ("{[a]: 1}", "a list or mapping can't be a key"),
        ("9" * 5000, "the number 99999999999999999999… has too many digits"),
        ("- " * 200 + "1", "more than 100 levels"),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)),
         "more than 10,000 values"),
    ],
)  # fmt: skip
def test_what_settings_do_not_need_is_refused(text: str, problem: str):
    with pytest.raises(YAMLError) as caught:
        loads(text)
    assert getattr(caught.value, "problem", "") == problem


def test_text_that_is_not_utf_8_is_refused_both_ways():
    with pytest.raises(YAMLError, match="not UTF-8 text"):
        loads("a: \udcff")
    with pytest.raises(ConfigError, match="can't be written as UTF-8 text"):
        dumps({"a": "\udcff"})


LOOKS_LIKE_MORE = [
    "695e0514", "12e5", "1e5", "Infinity", ".inf", "null", "~", "", "2026-01-02", "0x1F", "0o17", "017", "1_000",
    "12:30", "yes", "no", "on", "off", "true", "False", "<<", "=", "???", "${a}", r"\${a}", r"\\${a}\\", "${", " x ",
    "a: b", "a #b", "- a", "|", ">", "'", '"', "\\", "\n", "x\n\ny \n", "\t", "\x85", "\u2028", "\ufeff", "\x07", "😀",
    "实",
]  # fmt: skip
DIGITS = st.text("0123456789eE+-._:xob", max_size=8)
TEXTS = st.sampled_from(LOOKS_LIKE_MORE) | st.text() | DIGITS | st.text("\\${}?ab.")
NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False)
TREES = st.recursive(
    TEXTS | NUMBERS | st.booleans() | st.none(),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(TEXTS, parts, max_size=4),
    max_leaves=10,
)


def same(one: Any, other: Any) -> bool:
    """Equal, types too: 1, 1.0 and true are three values."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(TREES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_what_is_written_reads_as_the_same_here_and_elsewhere(tree: Any):
    text = dumps(tree)
    assert same(loads(text), tree)
    assert same(yaml.safe_load(text), tree)  # YAML 1.1
