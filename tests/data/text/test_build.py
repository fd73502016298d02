"""Preparation in many tasks: the same files whatever stopped it, by any number of processes and jobs."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.stages import tasks as engine
from dsv3_lightning.data.stages.tasks import Shard
from dsv3_lightning.data.text import documents as documents_module
from dsv3_lightning.data.text.documents import Files, cut_tasks
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.sources import Source
from dsv3_lightning.data.text.store import TokenFile, read_manifest
from dsv3_lightning.errors import ConfigError, RunStopped

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def many(tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A corpus of 7 tasks and several shards: lines, texts, and a conversation."""
    rng, corpus = random.Random(1), tmp_path / "corpus"
    corpus.mkdir()
    words = ["one", "two", " three", "vier\n", "数据", "?!\n\n", "12345", "naïve"]
    for name in "abc":
        lines = [{"text": "".join(rng.choices(words, k=rng.randint(1, 90)))} for _ in range(22)]
        (corpus / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    said = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three?!\n"}]
    (corpus / "d.jsonl").write_text(json.dumps({"text": said}))
    for number in range(8):
        (corpus / f"e{number}.txt").write_text("".join(rng.choices(words, k=100)))
    monkeypatch.setattr(documents_module, "TASK_BYTES", 5000)
    return make_config(tmp_path, vocab_size=330, shard_bytes=2000)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def elsewhere(config: DataConfig, name: str, **changes: Any) -> DataConfig:
    return dataclasses.replace(config, cache_dir=str(Path(config.cache_dir).parent / name), **changes)


def test_many_tasks_and_shards_hold_the_same_tokens_as_one(many: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    parted = prepare(many)
    assert len(list((parted / "train").glob("*.bin"))) > 4
    with monkeypatch.context() as patch:
        patch.setattr(documents_module, "TASK_BYTES", 1 << 26)
        whole = prepare(elsewhere(many, "whole", shard_bytes=1 << 28))
    assert {path.name for path in (whole / "train").iterdir()} == {
        f"00000.{end}" for end in ("bin", "idx", "src", "ans")
    }
    for split in ("train", "validation"):
        one, shards = TokenFile(whole, split), TokenFile(parted, split)
        assert np.array_equal(one.tokens[:], shards.tokens[:]) and np.array_equal(one.offsets(), shards.offsets())
        assert np.array_equal(one.origins(), shards.origins())
    spans = [TokenFile(folder, "train").loss_spans() for folder in (whole, parted)]
    learned = [
        np.searchsorted(bounds, np.arange(one.documents * 50), "right") % 2 for bounds in spans if bounds is not None
    ]
    assert len(learned) == 2 and np.array_equal(*learned)
    before, after = read_manifest(whole), read_manifest(parted)
    names = ("splits", "splits_by_origin", "gzip_bytes", "gzip_bpb", "tokenizer", "origins")
    assert {name: before[name] for name in names} == {name: after[name] for name in names}
    for split, numbers in after["splits"].items():
        by_origin = after["splits_by_origin"][split].values()
        assert numbers == {name: sum(found[name] for found in by_origin) for name in numbers}
    with monkeypatch.context() as patch:  # the pieces of several tasks, put together to one shard
        merged = prepare(elsewhere(many, "merged", shard_bytes=1 << 28))
    assert {name: data for name, data in contents(merged).items() if name != "manifest.json"} == {
        name: data for name, data in contents(whole).items() if name != "manifest.json"
    }


@pytest.mark.slow
def test_processes_give_what_one_gives(many: DataConfig) -> None:
    assert contents(prepare(many)) == contents(prepare(elsewhere(many, "two"), jobs=2))


def test_two_jobs_give_what_one_gives(many: DataConfig) -> None:
    shared = elsewhere(many, "shared")
    with pytest.raises(RunStopped, match="job 0/2 has done its part of reading") as stopped:
        prepare(shared, shard=Shard(0, 2))
    assert stopped.value.code == 0
    folder = prepare(shared, shard=Shard(1, 2))
    assert contents(folder) == contents(prepare(many))
    assert prepare(shared, shard=Shard(0, 2)) == folder
    assert sorted(path.suffix for path in folder.parent.iterdir()) == ["", ".lock"]


class Killed(BaseException):
    pass


def test_a_preparation_that_stops_anywhere_goes_on_to_the_same_files(
    many: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third write of a task's end stops it, before or after the task's folder has its name."""
    expected, stopping = contents(prepare(many)), elsewhere(many, "stopping")
    calls, stops = [0], 0
    whole, perform = engine.whole, engine.perform

    def stopped(path: Path) -> Any:
        calls[0] += 1
        if calls[0] % 3 == 2:
            raise Killed
        return whole(path)

    def stopped_after(*given: Any) -> Any:
        counts = perform(*given)
        if calls[0] % 3 == 1:
            raise Killed
        return counts

    monkeypatch.setattr(engine, "whole", stopped)
    monkeypatch.setattr(engine, "perform", stopped_after)
    while True:
        try:
            folder = prepare(stopping)
            break
        except Killed:
            stops += 1
    assert stops > 10 and contents(folder) == expected
    assert sorted(path.suffix for path in folder.parent.iterdir()) == ["", ".lock"]


def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_kept(
    many: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Path(many.paths[0])
    (corpus / "e9.txt.gz").write_bytes(b"\x1f\x8b\x08\x00broken")
    with pytest.raises(ConfigError, match="^data.paths: .*/e9.txt.gz: ") as raised:
        prepare(many)
    assert "\n" not in str(raised.value)
    (work,) = Path(many.cache_dir).glob("*.work")
    assert len(list(work.glob("survey/*/done.json"))) >= 5 and not list(work.glob("*/.*"))
    (corpus / "e9.txt.gz").unlink()  # so these are other files
    prepare(many)
    assert f"{work.name} is an unfinished preparation of other files or settings" in capsys.readouterr().err


def test_tasks_are_cut_by_bytes_and_only_plain_lines_within_a_file() -> None:
    sources = [Source(name, Path(name)) for name in ("a.jsonl", "b.txt", "c.jsonl.gz", "d.jsonl", "e.txt", "f.txt")]
    tasks = cut_tasks(sources, [250, 300, 20, 100, 0, 30], 100)
    assert [task["pieces"] for task in tasks] == [
        [[0, 0, 100]], [[0, 100, 200]], [[0, 200, None]], [[1, 0, None]], [[2, 0, None]], [[3, 0, None], [4, 0, None]],
        [[5, 0, None]],
    ]  # fmt: skip
    assert sum(task["bytes"] for task in tasks) == 250 + 300 + 80 + 100 + 30
    assert cut_tasks([], [], 100) == [{"pieces": [], "bytes": 0}]


def test_the_tasks_do_not_depend_on_where_the_files_are(many: DataConfig, tmp_path: Path) -> None:
    from dsv3_lightning.data.text.sources import sources_of

    before = Files.of(sources_of(many), many).tasks()
    Path(many.paths[0]).rename(tmp_path / "moved")
    moved = dataclasses.replace(many, paths=[str(tmp_path / "moved")])
    assert len(before) > 5 and Files.of(sources_of(moved), moved).tasks() == before
