"""What a corpus holds, and what a tokenizer learns from it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_lightning.data.config import DataConfig, SourceConfig
from dsv3_lightning.data.stages.tasks import Advance
from dsv3_lightning.data.text.documents import Files
from dsv3_lightning.data.text.sources import sources_of
from dsv3_lightning.data.text.survey import (
    SAMPLE,
    added,
    read_texts,
    sample_task,
    shares,
    survey_of,
    survey_task,
)  # fmt: skip
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError

MakeConfig = Callable[..., DataConfig]


def nothing(size: int) -> None:
    pass


ADVANCE: Advance = nothing


@pytest.fixture
def two(tmp_path: Path, make_config: MakeConfig) -> DataConfig:
    """Two sources, one of which has four times the text of the other."""
    for name, count in (("large", 400), ("small", 100)):
        lines = [json.dumps({"text": f"{name} {number:03}"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = {name: SourceConfig(paths=[str(tmp_path / f"{name}.jsonl")]) for name in ("small", "large")}
    return make_config(tmp_path, paths=[], sources=sources)


def sampled(config: DataConfig, folder: Path) -> dict[str, int]:
    """How many texts of each source are chosen."""
    corpus = Files.of(sources_of(config), config)
    (task,) = corpus.tasks()
    survey = survey_of([survey_task(task, folder, ADVANCE, corpus=corpus, checked=5)])
    assert survey.documents == 500 and survey.size == 500 * 9
    given = config.tokenizer_weights
    weights = None if given is None else {origin: given[corpus.origins[origin]] for origin in survey.text_bytes}
    part = shares(survey.text_bytes, weights, config.tokenizer_bytes)
    sample_task(task, folder, ADVANCE, corpus=corpus, last_validation=-1, shares=part)
    texts = list(read_texts(folder / SAMPLE))
    return {name: sum(text.startswith(name) for text in texts) for name in ("small", "large")}


def test_a_small_sample_has_the_sources_by_size(two: DataConfig, tmp_path: Path) -> None:
    assert sampled(two, tmp_path) == {"small": 100, "large": 400}
    found = sampled(dataclasses.replace(two, tokenizer_bytes=900), tmp_path)
    assert 10 < found["small"] < 30 and 60 < found["large"] < 100  # 100 documents in 1 : 4


def test_with_weights_the_sample_has_the_sources_in_their_proportion(two: DataConfig, tmp_path: Path) -> None:
    weights = {"small": 3.0, "large": 1.0}
    assert sampled(dataclasses.replace(two, tokenizer_weights=weights), tmp_path)["small"] in range(
        365, 386
    )  # each 3 or 4 times
    found = sampled(dataclasses.replace(two, tokenizer_weights=weights, tokenizer_bytes=900), tmp_path)
    assert 60 < found["small"] < 90 and 15 < found["large"] < 35


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"small": 1.0}, "names small; needs a weight for each of data.sources: small large"),
        ({"small": 1.0, "large": 1.0, "x": 1.0}, "names small large x; needs"),
        ({"small": -1.0, "large": 1.0}, "data.tokenizer_weights.small=-1.0: must be at least 0"),
        ({"small": 0.0, "large": 0.0}, "no source has a weight above 0"),
    ],
)
def test_weights_that_cannot_work_are_refused(two: DataConfig, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(two, tokenizer_weights=weights)


def test_the_sample_without_weights_is_that_of_one_process_before(two: DataConfig, tmp_path: Path) -> None:
    """Chosen by hash · 0x9E37… below the share, so the same texts by any number of tasks."""
    config = dataclasses.replace(two, tokenizer_bytes=2250)
    corpus = Files.of(sources_of(config), config)
    (task,) = corpus.tasks()
    expected = [document.texts[0] for document in corpus.read(task)
                if document.hash * 0x9E3779B97F4A7C15 % 2**64 < 2**63]  # fmt: skip
    sampled(config, tmp_path)
    assert list(read_texts(tmp_path / SAMPLE)) == expected and 200 < len(expected) < 300


def test_counts_of_tasks_add_up() -> None:
    assert added([{"a": 1, "b": {"x": 2}}, {"a": 3, "b": {"y": 1, "x": 1}}]) == {"a": 4, "b": {"x": 3, "y": 1}}
    assert survey_of([{"read": {}, "documents": 0, "hashes": [], "text_bytes": []}]).hashes == []


def test_a_tokenizer_of_the_smallest_size_is_one(two: DataConfig) -> None:
    tokenizer = Tokenizer.train(["one two three " * 50, "四五六" * 20], 512)
    assert tokenizer.vocab_size <= 512 and tokenizer.decode(tokenizer.encode("three 四五")) == "three 四五"
