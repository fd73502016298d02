"""Named sources: their files, origins and keys, and what is refused about them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_lightning.data.config import DataConfig, SourceConfig
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.sources import main_origins, sources_of
from dsv3_lightning.data.text.store import TokenFile, read_manifest
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def two(tmp_path: Path, make_config: MakeConfig) -> DataConfig:
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "a.txt").write_text("one two three", encoding="utf-8")
    (tmp_path / "en" / "b.txt").write_text("four five six", encoding="utf-8")
    (tmp_path / "zh.jsonl").write_text(json.dumps({"content": "数据"}) + "\n", encoding="utf-8")
    sources = {
        "chinese": SourceConfig(paths=[str(tmp_path / "zh.jsonl")], text_key="content", weight=1.0),
        "english": SourceConfig(paths=[str(tmp_path / "en")], weight=1.0),
    }
    return make_config(tmp_path, paths=[], sources=sources, validation_fraction=0.0)


def test_the_name_of_a_source_is_the_origin_of_its_documents(two: DataConfig) -> None:
    folder = prepare(two)
    origins, tokens = read_manifest(folder)["origins"], TokenFile(folder, "train")
    tokenizer, offsets = Tokenizer.from_file(folder), tokens.offsets()
    found = [
        (origins[origin], tokenizer.decode(tokens.tokens[begin:end].tolist(), skip_special_tokens=True))
        for origin, begin, end in zip(tokens.origins(), offsets[:-1], offsets[1:])
    ]
    assert found == [("chinese", "数据"), ("english", "one two three"), ("english", "four five six")]


def test_a_weight_does_not_prepare_again_but_another_name_does(two: DataConfig) -> None:
    assert two.sources is not None
    heavier = {name: replace(source, weight=3.0) for name, source in two.sources.items()}
    renamed = {"other" + name: source for name, source in two.sources.items()}
    assert prepare(replace(two, sources=heavier)) == prepare(two)
    assert prepare(replace(two, sources=renamed)) != prepare(two)


def test_no_named_source_is_merged_into_others(two: DataConfig) -> None:
    assert two.sources is not None
    many = sources_of(two) * 9
    many = [source._replace(origin=f"s{number}") for number, source in enumerate(many)]
    assert len(set(main_origins(many).values())) == 27


def test_messages_name_the_source(two: DataConfig, make_config: MakeConfig, tmp_path: Path) -> None:
    sources = {"web": SourceConfig(paths=[str(tmp_path / "nope.txt")])}
    with pytest.raises(ConfigError, match=r"^data\.sources\.web\.paths: .*nope.txt does not exist"):
        sources_of(make_config(tmp_path, paths=[], sources=sources))
    sources = {"chinese": SourceConfig(paths=[str(tmp_path / "zh.jsonl")])}
    with pytest.raises(ConfigError, match=r"^data\.sources\.chinese\.paths: .*zh.jsonl, line 1: no text under"):
        prepare(make_config(tmp_path, paths=[], sources=sources))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "must name a source"),
        ({"a b": SourceConfig(paths=["x"])}, "data.sources.a b: a source's name holds"),
        ({"a": SourceConfig(paths=[])}, "data.sources.a.paths=.*must name"),
        ({"a": SourceConfig(paths=["x"], weight=0.0)}, "data.sources.a.weight=0.0: must be above 0"),
        (
            {"a": SourceConfig(paths=["x"], weight=1.0), "b": SourceConfig(paths=["x"])},
            "data.sources.b: has neither weight nor epochs",
        ),
    ],
)
def test_sources_that_make_no_sense_are_refused(
    tmp_path: Path, make_config: MakeConfig, sources: dict[str, SourceConfig], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, paths=[], sources=sources)


def test_paths_and_sources_exclude_each_other(tmp_path: Path, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="data.paths and data.sources are both given"):
        make_config(tmp_path, sources={"a": SourceConfig(paths=["x"])})
