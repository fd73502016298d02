"""Files and overrides: what is merged, in which order, and how a mistake is reported."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_lightning.config.compose import compose, presets, to_yaml
from dsv3_lightning.config.overrides import split_words, text_override
from dsv3_lightning.errors import ConfigError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def message(files: list[str], overrides: list[str] = []) -> str:  # noqa: B006
    with pytest.raises(ConfigError) as caught:
        compose(files, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_later_files_win_and_each_is_merged_once_where_first_needed():
    write("base.yaml", "a: 1\nb: 1\nc: 1")
    write("one.yaml", "defaults: [base]\na: 2")
    write("two.yaml", "defaults: [base.yaml]\nb: 3")  # merging base a second time would put a back to 1
    composed = compose(["one.yaml", "two"], ["c=4"])
    assert composed.tree == {"a": 2, "b": 3, "c": 4}
    assert [path.name for path in composed.files] == ["base.yaml", "one.yaml", "two.yaml"]
    assert all(path.is_absolute() for path in composed.files)


def test_defaults_are_looked_for_beside_their_file_then_among_the_presets():
    write("sub/mine.yaml", "defaults: [nano]\nrun: {seed: 7}")
    assert [path.name for path in compose(["sub/mine"]).files] == ["base.yaml", "nano.yaml", "mine.yaml"]
    write("sub/nano.yaml", "run: {name: nearer}")
    assert compose(["sub/mine"]).tree == {"run": {"name": "nearer", "seed": 7}}


def test_interpolation_sees_files_and_overrides_that_come_later():
    write("a.yaml", "x: {size: 16}\ny: {size: '${x.size}', text: 'n${x.size}'}")
    write("b.yaml", "x: {size: 32}")
    assert compose(["a", "b"]).tree["y"] == {"size": 32, "text": "n32"}
    assert compose(["a", "b"], ["x.size=64"]).tree["y"] == {"size": 64, "text": "n64"}
    assert compose(["a", "b"], ["x.size=64", "z=${y.size}"]).tree["z"] == 64


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "0.00002", "2.0e-5"])
def test_plain_text_numbers_are_numbers(text: str):
    write("a.yaml", f"inside: {{deep: [{text}]}}")
    assert compose(["a"], [f"outside={text}", f"list=[[0,{text}]]"]).tree == {
        "inside": {"deep": [2e-5]},
        "outside": 2e-5,
        "list": [[0, 2e-5]],
    }


@pytest.mark.parametrize("place", ["[1][1]", ".1.1", "[1].1"])
def test_one_element_of_a_list_is_changed_alone(place: str):
    write("a.yaml", "s: {schedule: [[0.0, 0.3], [0.67, 0.1]]}")
    assert compose(["a"], [f"s.schedule{place}=0.05"]).tree == {"s": {"schedule": [[0.0, 0.3], [0.67, 0.05]]}}


def test_values_may_hold_equal_signs_spaces_and_umlauts():
    path = "runs/my run/checkpoints/epoch=0-step=10.ckpt"
    overrides = [f"a.path={path}", 'b=["/da ta/ü b.txt", x=y]', "c=null", "d={e: 1}", "f='1e3'", "g="]
    assert compose([], overrides).tree == {
        "a": {"path": path},
        "b": ["/da ta/ü b.txt", "x=y"],
        "c": None,
        "d": {"e": 1},
        "f": "1e3",
        "g": None,
    }


def test_a_mapping_given_as_override_is_merged_as_in_a_file():
    write("a.yaml", "s: {x: 1, y: 2}\nt: auto")
    assert compose(["a"], ["s={y: 3}", "t.kind=fsdp2"]).tree == {"s": {"x": 1, "y": 3}, "t": {"kind": "fsdp2"}}


def test_words_are_overrides_where_they_start_with_a_dotted_key():
    words = ["a.yaml", "a.b=c", "a[0].b-c=./x/y=z", "./a=b.yaml", "dir/a=b", "größe=1", "1=2", "x="]
    assert split_words(words) == (
        ["a.yaml", "./a=b.yaml", "dir/a=b", "1=2"],
        ["a.b=c", "a[0].b-c=./x/y=z", "größe=1", "x="],
    )


def test_files_are_utf8_with_or_without_a_byte_order_mark():
    Path("bom.yaml").write_bytes("\ufeff# a dash \u2014\nname: 实验".encode())
    assert compose(["bom.yaml"]).tree == {"name": "实验"}


def test_printed_settings_compose_to_themselves():
    tree = {"a": "${b}", "b": "1e3", "c": [1e-8, "😀", "null", "x\ny: z "], "d": {"实": None, "e": True}}
    write("printed.yaml", to_yaml(tree))
    assert compose(["printed.yaml"]).tree == tree


TEXTS = (
    st.text("\\${}?ab.")
    | st.sampled_from(["${run.seed}", "???", r"\${a}\\", "010", "12e5", "no", "~", "x\n"])
    | st.text()
)


@given(st.lists(TEXTS, max_size=4))
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_of_a_tree_is_printed_as_itself_and_set_as_itself(texts: list[str]):
    tree = {"a": [text for text in texts if text != "???"], "seed": 1}  # which stands for a missing value
    write("printed.yaml", to_yaml(tree))
    assert compose(["printed.yaml"]).tree == tree
    for text in tree["a"]:
        assert compose([], [text_override("a.b", text)]).tree == {"a": {"b": text}}


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("12:30", "12:30"), ("1_000", "1_000"), ("no", "no")])
def test_files_and_overrides_are_read_alike(text: str, value: Any):
    write("a.yaml", f"inside: {{deep: [{text}]}}")
    assert compose(["a"], [f"outside={text}"]).tree == {"inside": {"deep": [value]}, "outside": value}


def test_every_preset_is_found_by_name():
    assert {"base", "nano", "laptop", "v2-lite", "moonlight", "v3"} <= set(presets())


def here(name: str = "") -> str:
    return os.path.join(os.getcwd(), name) if name else os.getcwd()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1\nc: 2", "{file}:3: did not find expected ',' or ']'"),
        ("a: 1\nb: 2\na: 3", "{file}:3: found duplicate key a"),
        ("a:\n\tb: 1", "{file}:2: found character that cannot start any token"),
        ("- 1\n- 2", "{file}: must hold sections such as `model:`, not a list"),
        ("defaults: base", "{file}: defaults=base: must be a list of file names, such as [base]"),
        ("a: ${b.c}", "a: Interpolation key 'b.c' not found"),
        ("a: ${b}\nb: ${a}", "a: Recursive interpolation detected"),
        ("a:\n  b: ???", "a.b: has no value yet (???); set it in a file or as a.b=…"),
        ("a: ${b}\nb: ${c}\nc: ???", "c: has no value yet (???); set it in a file or as c=…"),
        ("a:\n- b: ???", "a[0].b: has no value yet (???); set it in a file or as a[0].b=…"),
        ("defaults: [x]", "{file}: circular defaults: x.yaml -> x.yaml"),
        ("defaults: [lapto]", "lapto: no such file in {here}, nor a preset; did you mean laptop?"),
        (f"defaults: [{'x' * 300}]", f'"{"x" * 78}…: File name too long'),
    ],
)
def test_a_broken_file_is_reported_in_one_line(text: str, expected: str):
    write("x.yaml", text)
    assert message(["x.yaml"]) == expected.format(file=here("x.yaml"), here=here())


def test_more_broken_files():
    Path("latin.yaml").write_bytes(b"name: \xfc")
    assert message(["latin.yaml"]) == f"{here('latin.yaml')}: not UTF-8 text (byte 6)"
    write("a.yaml", "defaults: [b]")
    write("b.yaml", "defaults: [a]")
    assert message(["a"]) == f"{here('b.yaml')}: circular defaults: a.yaml -> b.yaml -> a.yaml"
    write("map.yaml", "s: {t: {x: 1}}")
    write("list.yaml", "s: {t: [1]}")
    assert message(["map", "list"]) == f"{here('list.yaml')}: s.t: a list and a mapping can't be merged"
    assert message(["sub/qqq.yaml"]).startswith(f"sub/qqq.yaml: no such file in {here()}, nor a preset; valid: base")
    assert message(["."]).startswith(".: no such file")  # a folder is none


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("s.list[2]=1", "s.list[2]: s.list has 2 elements, counted from 0; there is no 2"),
        ("s.list.first=1", "s.list.first: s.list has 2 elements, counted from 0; there is no first"),
        ("s.list[1][0]=1", "s.list[1][0]: s.list[1]=6 is one value; it has no 0"),
        ("s.lr.x=1", "s.lr.x: s.lr=0.1 is one value; it has no x"),
        ("s.lr=[1", "s.lr=[1: not a YAML value (did not find expected ',' or ']'); for text write s.lr='\"…\"'"),
        ("s=[1]", "s=[1]: Cannot merge incompatible container types"),
    ],
)
def test_an_impossible_override_is_reported_in_one_line(override: str, expected: str):
    write("a.yaml", "s: {list: [5, 6], lr: 0.1}")
    assert message(["a"], [override]) == expected
