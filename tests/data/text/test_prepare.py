"""Prepared once, whole or not at all, and again when anything that matters has changed."""

import dataclasses
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.stages.tasks import ALL, present
from dsv3_lightning.data.text import digests, encoding
from dsv3_lightning.data.text import prepare as prepare_module
from dsv3_lightning.data.text.documents import HASHES
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.store import TokenFile, TokenWriter, read_manifest
from dsv3_lightning.data.text.survey import validation_threshold
from dsv3_lightning.data.text.tokenizer import BOS, EOS, Tokenizer
from dsv3_lightning.errors import ConfigError

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def small(tmp_path: Path, make_config: MakeConfig) -> DataConfig:
    """Twenty short texts; quick to prepare again and again."""
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        (tmp_path / "corpus" / f"{number:02}.txt").write_text(f"text number {number} " * (number + 1))
    return make_config(tmp_path, vocab_size=300)


def documents(folder: Path, split: str) -> list[str]:
    """The texts of a split, from the token files; each must be BOS ... EOS."""
    file, tokenizer = TokenFile(folder, split), Tokenizer.from_file(folder)
    offsets, texts = file.offsets(), []
    for start, end in zip(offsets, offsets[1:]):
        ids = file.tokens[start:end].tolist()
        assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
        assert tokenizer.bos_id not in ids[1:] and tokenizer.eos_id not in ids[:-1]
        texts.append(tokenizer.decode(ids[1:-1]))
    return texts


def no_build(*arguments: Any) -> None:
    raise AssertionError("built again")


def test_the_files_hold_the_texts(config: DataConfig, texts: list[str]) -> None:
    folder = prepare(config)
    train, validation = documents(folder, "train"), documents(folder, "validation")
    hashes = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts]
    assert train == [text for text, value in zip(texts, hashes) if value >= 0.2 * HASHES]
    assert validation == [text for text, value in zip(texts, hashes) if value < 0.2 * HASHES] and validation

    manifest = read_manifest(folder)
    for split, held in (("train", train), ("validation", validation)):
        size = sum(len(text.encode()) for text in held)
        tokens = len(TokenFile(folder, split).tokens)
        assert manifest["splits"][split] == {"documents": len(held), "tokens": tokens, "text_bytes": size}
    joined = "".join(validation).encode()
    assert manifest["gzip_bytes"] == len(gzip.compress(joined, 9))
    assert manifest["gzip_bpb"] == 8 * manifest["gzip_bytes"] / len(joined)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    packed = {name for name in names if "/index-" in name}  # by another test
    assert names - packed == {*manifest["files"], "manifest.json"}
    for name, record in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_tokenizer_learns_from_training_texts_alone(config: DataConfig) -> None:
    folder = prepare(config)
    again = Tokenizer.train(documents(folder, "train"), config.vocab_size)
    assert again.sha256 == read_manifest(folder)["tokenizer"]["sha256"] == Tokenizer.from_file(folder).sha256


def test_a_corpus_larger_than_a_batch_keeps_its_order(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = documents(prepare(config), "train")
    monkeypatch.setattr(encoding, "BATCH", 700)
    assert documents(prepare(dataclasses.replace(config, cache_dir=str(tmp_path))), "train") == expected


def test_what_is_there_is_not_built_again(small: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(small)
    monkeypatch.setattr(prepare_module, "build_whole", no_build)
    other: dict[str, Any] = {
        "sequence_length": 7,
        "batch_size": 3,
        "seed": 9,
        "num_workers": 2,
        "mask_document_ends": True,
    }
    assert prepare(small) == prepare(dataclasses.replace(small, **other)) == folder
    moved = Path(small.cache_dir).parent / "moved"
    (Path(small.cache_dir).parent / "corpus").rename(moved)
    assert prepare(dataclasses.replace(small, paths=[str(moved)])) == folder


def test_what_has_changed_is_built_again(small: DataConfig) -> None:
    corpus = Path(small.paths[0])
    folders = {prepare(small)}
    (corpus / "00.txt").write_text("TEXT number 0 ")  # the same size
    folders.add(prepare(small))
    (corpus / "20.txt").write_text("more")
    folders.add(prepare(small))
    (corpus / "20.txt").rename(corpus / "21.txt")
    folders.add(prepare(small))
    for change in ({"validation_fraction": 0.5}, {"vocab_size": 310}, {"text_key": "body"}):
        folders.add(prepare(dataclasses.replace(small, **change)))
    trained = Path(prepare(small)) / "tokenizer.json"
    folders.add(prepare(dataclasses.replace(small, tokenizer=str(trained))))
    assert len(folders) == 8 and all((folder / "manifest.json").exists() for folder in folders)


def test_a_large_file_is_read_again_only_when_it_has_changed(
    small: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = digests.digest
    monkeypatch.setattr(digests, "digest", lambda path: (read.append(path.name), digest(path))[1])
    monkeypatch.setattr(digests, "LARGE", 100)
    large, folder = Path(small.paths[0]) / "19.txt", prepare(small)
    assert prepare(small) == folder and read.count("19.txt") == 2  # written a moment ago
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    read.clear()
    assert prepare(small) == prepare(small) == prepare(small) == folder
    assert (read.count("19.txt"), read.count("00.txt")) == (1, 3)
    before = large.stat()
    large.write_text(large.read_text().upper())
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p and rsync do
    other = prepare(small)
    assert other != folder and prepare(small) == other and read.count("19.txt") == 2
    remembered = Path(small.cache_dir) / "digests.json"
    remembered.write_text(remembered.read_text()[:-9])
    assert prepare(small) == other and read.count("19.txt") == 3
    remembered.unlink()
    remembered.mkdir()  # nothing can be kept
    assert prepare(small) == other


@pytest.mark.parametrize("name", ["train/00000.bin", "validation/00000.idx", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_rebuilt(small: DataConfig, name: str, damage: str) -> None:
    path = prepare(small) / name
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-1])
    else:
        path.unlink()
    assert prepare(small) == path.parents[name.count("/")] and path.read_bytes() == whole


def test_work_that_a_kill_left_beside_the_complete_folder_is_removed(small: DataConfig) -> None:
    folder = prepare(small)
    work = prepare_module.work_folder(folder)
    (work / "survey").mkdir(parents=True)
    with present(work, ALL):  # another job is still at it
        assert prepare(small) == folder and work.exists()
    assert prepare(small) == folder and not work.exists()


@pytest.mark.parametrize("place", ["add", "close"])
def test_a_failure_leaves_nothing_that_looks_finished(
    small: DataConfig, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    cache, original, calls = Path(small.cache_dir), getattr(TokenWriter, place), []

    def fail(self: TokenWriter, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, place, fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(small)
    assert not list(cache.glob("*/manifest.json"))
    assert len(documents(prepare(small), "train")) > 10
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]  # the leftovers are gone


CHILD = """
import json, os, sys, time
from dsv3_lightning.data.text import build
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.prepare import prepare
if sys.argv[2] == "stop":                     # everything is written but the manifest
    build.write_manifest = lambda *_: (print("there", flush=True), time.sleep(60))
print(prepare(DataConfig(**json.loads(sys.argv[1]))))
"""


def child(config: DataConfig, mode: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, json.dumps(dataclasses.asdict(config)), mode]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_killed_preparation_is_started_again(small: DataConfig) -> None:
    process = child(small, "stop")
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    cache = Path(small.cache_dir)
    assert {path.suffix for path in cache.iterdir() if path.is_dir()} == {".new", ".work"}
    folder = prepare(small)  # the lock died with its holder
    assert len(documents(folder, "train")) > 10 and [path for path in cache.iterdir() if path.is_dir()] == [folder]


def test_several_at_the_same_time_build_once(small: DataConfig) -> None:
    processes = [child(small, "go") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert "".join(errors for _, errors in outputs).count("prepared ") == 1


def test_equal_texts_stay_on_one_side(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(60):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"text {number % 12}")
    folder = prepare(make_config(tmp_path, vocab_size=300, validation_fraction=0.5))
    train, validation = documents(folder, "train"), documents(folder, "validation")
    assert len(train) + len(validation) == 60 and not set(train) & set(validation) and validation


@pytest.mark.parametrize(
    ("hashes", "fraction", "validation"),
    [
        ([5, 1 << 63, HASHES - 1], 0.0, 0),
        ([5, 1 << 63, HASHES - 1], 1e-30, 1),  # nothing is below it: the lowest
        ([1 << 63, (1 << 63) + 1], 0.01, 1),
        ([5, 6], 0.99, 1),  # all are below it: but the highest
        ([5, 6, 6], 0.99, 1),
        ([5], 0.99, 0),  # training comes first
        ([7, 7], 0.5, 0),
        ([1 << 62, (1 << 63) - 1, 1 << 63, HASHES - 1], 0.5, 2),
    ],
)
def test_both_sides_hold_a_document_where_that_is_possible(hashes: list[int], fraction: float, validation: int) -> None:
    assert sum(value <= validation_threshold(hashes, fraction) for value in hashes) == validation


def test_a_corpus_without_text_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"^data.paths=\['.*corpus'\]: no text in 1 files; left out: 1 document with"):
        prepare(make_config(tmp_path))


def test_a_corpus_of_one_text_has_no_validation(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "only.txt").write_text("x")
    folder = prepare(make_config(tmp_path))
    assert documents(folder, "train") == ["x"] and documents(folder, "validation") == []
    assert read_manifest(folder)["gzip_bpb"] is None


def test_what_the_tokens_lack_of_the_files_is_reported_at_every_start_and_recorded(small: DataConfig) -> None:
    folder = Path(small.paths[0])
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_bytes(b"\xff" + name.encode())
    (folder / "table.csv").write_text("1,2")
    lines = [
        "data.paths: read 22 of 23 files; not read: 1 .csv",
        "data.paths: not UTF-8: U+FFFD stands for 2 characters: 1 in a.txt, 1 in b.txt",
    ]
    for _ in ("prepared", "found"):
        reported: list[str] = []
        manifest = read_manifest(prepare(small, tell=reported.append))
        assert reported == lines
    assert manifest["replaced_characters"] == {"a.txt": 1, "b.txt": 1} and manifest["files_left_out"] == {".csv": 1}
    (folder / "more.csv").write_text("1,2")
    reported = []
    assert prepare(small, tell=reported.append).name == prepare(small, tell=None).name and "2 .csv" in reported[0]


def test_bad_lines_are_skipped_in_every_pass(small: DataConfig) -> None:
    (Path(small.paths[0]) / "x.jsonl").write_text('{"text": "good"}\n{"text": 1}\nbad\n{"text": "fine"}\n')
    with pytest.raises(ConfigError, match="line 2: text=1"):
        prepare(small)
    folder = prepare(dataclasses.replace(small, skip_bad_lines=True, validation_fraction=0.0))
    assert documents(folder, "train")[-2:] == ["good", "fine"]
    assert read_manifest(folder)["skipped_lines"] == {"x.jsonl": 2}


def test_conversations_without_any_text_can_be_prepared(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "corpus").mkdir()
    line = {"text": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}
    (tmp_path / "corpus/x.jsonl").write_text(json.dumps(line))
    manifest = read_manifest(prepare(make_config(tmp_path)))
    assert manifest["splits"]["train"]["text_bytes"] == 0 and manifest["gzip_bpb"] is None


def test_control_tokens_in_a_text_stay_text(small: DataConfig) -> None:
    text = f"a{EOS}b{BOS} <｜fim▁hole｜>"
    (Path(small.paths[0]) / "evil.txt").write_text(text, encoding="utf-8")
    folder = prepare(dataclasses.replace(small, validation_fraction=0.0))
    assert text in documents(folder, "train")  # which checks for one BOS and one EOS in each document


def test_a_tokenizer_larger_than_the_model_is_refused(small: DataConfig, tmp_path: Path) -> None:
    (Path(small.paths[0]) / "more.txt").write_text(" ".join(f"{a}{b}{c}" for a in "abc" for b in "abcd" for c in "xyz"))
    folder = prepare(dataclasses.replace(small, vocab_size=310))
    size = Tokenizer.from_file(folder).vocab_size
    given = dataclasses.replace(small, tokenizer=str(folder / "tokenizer.json"), vocab_size=size)
    prepare(given)
    smaller = dataclasses.replace(given, vocab_size=size - 1)  # also where the files are there already
    with pytest.raises(ConfigError, match=f"^data.vocab_size={size - 1}: the ids of .* go up to {size - 1}; needs"):
        prepare(smaller)


def test_a_cache_that_cannot_be_written_is_named(small: DataConfig) -> None:
    Path(small.cache_dir).write_text("a file")
    with pytest.raises(ConfigError, match=f"^data.cache_dir={small.cache_dir}: "):
        prepare(small)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_one_huge_line_takes_linear_time(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "corpus").mkdir()
    line = "".join(chr(97 + int(digit)) for digit in np.random.default_rng(0).integers(0, 26, 3_000_000))
    (tmp_path / "corpus" / "line.txt").write_text(line)  # one word without end; quadratic work would take minutes
    assert documents(prepare(make_config(tmp_path, vocab_size=300)), "train") == [line]


def test_a_larger_vocabulary_needs_a_tokenizer_that_exists(config: DataConfig) -> None:
    with pytest.raises(
        ConfigError, match="^data.vocab_size=163840: .* up to 129,280; data.tokenizer names a larger one$"
    ):
        prepare(dataclasses.replace(config, vocab_size=163840))  # a plan of such a model needs none
