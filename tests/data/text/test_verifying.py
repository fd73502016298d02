"""`dsv3 data`: every damage is named, and what is there is shown as the model sees it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsv3_lightning.cli import main
from dsv3_lightning.common.files import write_file
from dsv3_lightning.data.batches.index import Cut, prepare_index
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.prepare import prepare
from dsv3_lightning.data.text.store import read_manifest, write_manifest


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., DataConfig]) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for name, count in (("english", 30), ("中文", 12)):
        (folder / "corpus" / name).mkdir(parents=True)
        for number in range(count):
            (folder / "corpus" / name / f"{number}.txt").write_text(f"{name} number {number} " * 9)
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (folder / "corpus" / "talk.jsonl").write_text(json.dumps({"text": said}))
    return prepare(make_config(folder, vocab_size=330, shard_bytes=2000, sequence_length=16))


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_what_is_whole_is_verified(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(prepared)]) == 0
    files = len(read_manifest(prepared)["files"])
    assert files > 10 and f"{files} files, " in capsys.readouterr().out
    assert main(["data", "verify", str(prepared.parent)]) == 0  # the newest below data.cache_dir


def test_every_changed_cut_or_missing_file_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in read_manifest(copy)["files"]:
        path = copy / name
        content = path.read_bytes()
        for damaged, what in (
            (bytes([content[0] ^ 1]) + content[1:], "sha256 begins with"),
            (content[:-1], f"has {len(content) - 1:,} bytes"),
            (None, "No such file"),
        ):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            assert main(["data", "verify", str(copy)]) == 2
            error = capsys.readouterr().err
            assert f"damaged: {name}: " in error and what in error and error.count("\n") == 1
            path.write_bytes(content)
    assert main(["data", "verify", str(copy)]) == 0


@pytest.mark.parametrize(
    ("name", "numbers", "dtype", "what"),
    [
        ("train/00001.idx", [0, 5, 3], "<u8", "train/00001: its documents don't make up its tokens"),
        ("train/00001.src", [9], "<u2", "train/00001: its documents' origins aren't those of the manifest"),
        ("train/00001.bin", [9999], "<u2", "train/00001: has ids at or above the vocabulary's size 3"),
    ],
)
def test_files_that_do_not_fit_together_are_named_although_their_hashes_are_right(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str, numbers: list[int], dtype: str, what: str
) -> None:
    content = np.fromfile(copy / name, dtype)
    content[-len(numbers) :] = numbers
    manifest = read_manifest(copy)
    manifest["files"][name] = write_file(copy / name, content.tobytes())
    write_manifest(copy, manifest)
    assert main(["data", "verify", str(copy)]) == 2
    assert what in capsys.readouterr().err


def test_a_damaged_manifest_and_a_folder_without_data_are_named(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "manifest.json").write_text("{")
    assert main(["data", "verify", str(copy)]) == 2 and "manifest.json: is damaged" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["data", "verify", str(tmp_path / "empty")]) == 2
    assert "holds no prepared data; dsv3 prepare prints the folder" in capsys.readouterr().err


def test_documents_of_a_source_are_shown_with_their_control_tokens(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "inspect", str(prepared), "--source", "中文", "--documents", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- document") == 2 and "of 中文" in shown and "of english" not in shown
    assert "<｜begin▁of▁sentence｜>中文 number" in shown and shown.count("<｜end▁of▁sentence｜>") == 2
    assert main(["data", "inspect", str(prepared), "--source", "french"]) == 2
    assert "--source french: is not in the data; those are " in capsys.readouterr().err


def test_a_sample_is_shown_as_it_is_read(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(copy), "--sample", "0"]) == 2 and "isn't packed yet" in capsys.readouterr().err
    prepare_index(copy, dict.fromkeys(("train", "validation"), Cut(16, 1, False)))
    assert main(["data", "inspect", str(copy), "--sample", "1"]) == 0
    shown = capsys.readouterr().out
    assert "sample 1 of index-2-16-1" in shown and "18 tokens" in shown and "begun in another sample" in shown
    assert main(["data", "inspect", str(copy), "--sample", "10000"]) == 2


def test_counts_are_shown_by_split_and_source(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(prepared)]) == 0
    shown = capsys.readouterr().out
    numbers = read_manifest(prepared)["splits_by_origin"]["train"]["english"]
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("train") and "english" in line]
    assert row[2] == str(numbers["documents"]) and row[-1] == f"{numbers['tokens']:,}"
    assert "bytes per token" in shown
