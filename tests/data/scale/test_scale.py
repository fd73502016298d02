"""Cleaning on datatrove's executors: the same files as our own engine's, and the same documents are left."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_lightning.common.typed import build
from dsv3_lightning.config.compose import PRESETS, read_yaml
from dsv3_lightning.data.cleaning import stage
from dsv3_lightning.data.cleaning.config import CleaningConfig
from dsv3_lightning.data.cleaning.corpus import Plan, clean, plan, source_folder
from dsv3_lightning.data.config import DataConfig, SourceConfig
from dsv3_lightning.data.scale.dump import Dump, shown
from dsv3_lightning.data.scale.executors import executors
from dsv3_lightning.data.scale.steps import Clean, KeepFirst, ranks, records
from dsv3_lightning.data.text.corpus import read_documents
from dsv3_lightning.data.text.sources import find_sources, sources_of
from dsv3_lightning.errors import ConfigError

WORDS = [f"word{number}" for number in range(300)]


@pytest.fixture
def config(tmp_path: Path, make_config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(stage, "TASK_BYTES", 2000)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=80)) for _ in range(12)]
    texts += [f"{texts[number]} and some more" for number in range(4)] + [texts[7], "short", "short"]
    for name, found in (("a", texts[:9]), ("b", texts[9:])):
        (tmp_path / name).mkdir()
        for number, text in enumerate(found):
            (tmp_path / name / f"{number:02}.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    published = read_yaml(PRESETS / "cleaning.yaml")["data"]["cleaning"]  # type: ignore[arg-type]
    cleaning = build(CleaningConfig, {**published, "languages": None, "repair": False})
    sources = {name: SourceConfig(paths=[str(tmp_path / name)]) for name in "ab"}
    return make_config(tmp_path, paths=[], sources=sources, cleaning=cleaning)


def planned(config: DataConfig) -> Plan:
    return plan(config, sources_of(config))


def kept(files: list[Any]) -> list[Any]:
    return list(read_documents(files, "text"))


def test_ranks_write_the_files_of_the_local_engine(config: DataConfig) -> None:
    other = dataclasses.replace(config, cache_dir=config.cache_dir + "-2")
    ours, theirs = planned(config), planned(other)
    clean(ours)
    tasks = ranks(theirs)
    assert len(tasks) > 2
    for rank in range(len(tasks)):
        Clean(theirs)(None, rank, len(tasks))
    for name in ours.sources:
        folders = [source_folder(one, name) for one in (ours, theirs)]
        one, two = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
                     and path.suffix != ".lock"} for folder in folders)  # fmt: skip
        assert one == two


def test_another_number_of_ranks_is_refused(config: DataConfig) -> None:
    found = planned(config)
    with pytest.raises(ConfigError, match=rf"tasks=99: these files make {len(ranks(found))} tasks"):
        Clean(found)(None, 0, 99)


def test_the_chain_leaves_the_documents_of_our_join_in_its_order(config: DataConfig, tmp_path: Path) -> None:
    local = pytest.importorskip("datatrove.executor.local", exc_type=ImportError)
    found = planned(config)
    for stage_of_chain in executors(found, tmp_path / "out", local.LocalPipelineExecutor, workers=1):
        stage_of_chain.run()
    ours = clean(found)
    assert ours is not None
    for name in "ab":
        theirs = kept(find_sources([str(tmp_path / "out" / "kept" / name)]))
        assert theirs == kept([file for file in ours.files if file.origin == name])
    assert len(kept(ours.files)) == 13


def test_the_first_document_of_a_cluster_stays_in_whatever_rank_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ranks_of = rng.integers(0, 3, 200)
    numbers, clusters = np.arange(200), rng.integers(0, 40, 200)
    for rank in range(3):
        own = np.stack([numbers, clusters], 1)[ranks_of == rank].astype("<u4")
        own.tofile(tmp_path / f"{rank:06}.clusters")
        own[::2, 0].tofile(tmp_path / f"{rank:06}.remove")  # as another stage has chosen
    KeepFirst(tmp_path)(None)
    seen: set[int] = set()
    for rank in range(3):
        expected = []
        for number in numbers[ranks_of == rank]:
            if clusters[number] in seen:
                expected.append(number)
            seen.add(clusters[number])
        assert np.fromfile(tmp_path / f"{rank:06}.remove", "<u4").tolist() == expected


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_executors_of_clusters_are_constructed(config: DataConfig, tmp_path: Path, name: str) -> None:
    module = pytest.importorskip(f"datatrove.executor.{name}", exc_type=ImportError)
    cls = module.SlurmPipelineExecutor if name == "slurm" else module.RayPipelineExecutor
    arguments: dict[str, Any] = {"time": "1:00:00", "partition": "cpu"} if name == "slurm" else {}
    chain = executors(planned(config), tmp_path / "out", cls, **arguments)
    assert [one.world_size for one in chain] == [len(ranks(planned(config))), 14, 1, len(ranks(planned(config)))]
    assert all(one.depends is before for one, before in zip(chain[1:], chain))


def test_records_are_sorted_and_equal_short_texts_match() -> None:
    values = np.array([[3, 1], [2, 9], [0xFFFFFFFF] * 2, [0xFFFFFFFF] * 2], np.uint32)
    digests = np.array([[1, 2], [3, 4], [160, 320], [160, 320]], np.uint64)
    found = records(values, digests, 0)
    assert found.dtype.itemsize == 2 * 8 + 4
    assert found.tolist() == [(2, 9, 1), (3, 1, 0), (10, 20, 2), (10, 20, 3)]


def test_what_a_dump_takes() -> None:
    text = shown(Dump(), {"html": 20.0, "near": 40.0})
    assert "5,895" in text and "265" in text and "1.274 TB" in text  # 386 TiB / 20 MB/s; 9 % of it / 40; 2.7e9 · 472 B
