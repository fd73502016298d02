"""What is written is what is read, at every width, and nothing that is damaged passes for whole."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from dsv3_lightning.data.text.store import (
    FORMAT,
    TokenFile,
    TokenWriter,
    is_complete,
    token_dtype,
    write_manifest,
)  # fmt: skip
from dsv3_lightning.errors import ConfigError


def write(folder: Path, documents: list[list[int]], vocab_size: int) -> TokenFile:
    writer = TokenWriter(folder, "train", vocab_size, bos_id=0, eos_id=vocab_size - 1)
    for ids in documents:
        writer.add(np.array(ids, dtype=np.uint32))
    write_manifest(folder, {"format": FORMAT, "dtype": token_dtype(vocab_size), "files": writer.close()})
    return TokenFile(folder, "train")


@pytest.mark.parametrize(("vocab_size", "width"), [(65_535, 2), (65_536, 2), (65_537, 4), (128_815, 4), (129_280, 4)])
def test_the_top_ids_survive(tmp_path: Path, vocab_size: int, width: int) -> None:
    top = list(range(max(0, vocab_size - 5), vocab_size))
    file = write(tmp_path, [top, [7], []], vocab_size)
    eos = vocab_size - 1
    assert file.tokens.tolist() == [0, *top, eos, 0, 7, eos, 0, eos]  # uint16 would turn 65,536 into 0
    assert file.offsets().tolist() == [0, 7, 10, 12]  # an EOS in the text ends no document
    assert file.tokens.itemsize == width == np.dtype(file.manifest["dtype"]).itemsize
    raw = (tmp_path / "train" / "00000.bin").read_bytes()
    assert raw[width : width + 2] == (vocab_size - 5).to_bytes(4, "little")[:2]


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    """Of 10 tokens at most, but for a longer document; with a conversation in two of the shards."""
    rng = np.random.default_rng(0)
    sizes = [0, 3, 2, 4, 18, 1, 0, 5, 8, 6]
    documents = [rng.integers(1, 999, size).astype(np.uint32) for size in sizes]
    files = {}
    for name, shard_bytes in (("one", None), ("many", 20)):
        (tmp_path / name).mkdir()
        writer = TokenWriter(tmp_path / name, "train", 1000, bos_id=0, eos_id=999, shard_bytes=shard_bytes)
        for number, ids in enumerate(documents):
            if number in (3, 9):
                writer.add_whole(np.array([0, *ids, 999]), [(1, 3), (4, 6)], number)
            else:
                writer.add(ids, number)
        manifest = {"format": FORMAT, "dtype": token_dtype(1000), "files": writer.close()}
        write_manifest(tmp_path / name, manifest)
        assert is_complete(tmp_path / name)
        files[name] = TokenFile(tmp_path / name, "train")
    one, many = files["one"], files["many"]
    held = [manifest["files"][f"train/{number:05}.bin"]["bytes"] // 2 for number in range(7)]
    assert len(many.names) == 7 and held == [
        7,
        10,
        20,
        5,
        7,
        10,
        8,
    ]  # one document each from the third shard on: 20, 3+2
    tokens = one.tokens[:]
    assert len(many.tokens) == len(tokens) and many.documents == one.documents == 10
    assert many.offsets().tolist() == one.offsets().tolist() and many.origins().tolist() == list(range(10))
    for where in (rng.integers(0, len(tokens), 500), np.arange(2, 6), np.arange(len(tokens)), np.empty(0, np.int64)):
        assert many.tokens[where].tolist() == tokens[where].tolist()
    assert many.tokens[5:40].tolist() == tokens[5:40].tolist()
    spans = [file.loss_spans() for file in (one, many)]
    learned = [np.searchsorted(bounds, np.arange(len(tokens)), "right") % 2 for bounds in spans if bounds is not None]
    assert learned[0].tolist() == learned[1].tolist() and 0 < learned[0].sum() < len(tokens)
    assert np.array_equal(pickle.loads(pickle.dumps(many)).tokens[:], tokens)


@pytest.mark.parametrize("wrong", [1000, 65_536, 70_000, 2**32 - 1])
def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path, wrong: int) -> None:
    with pytest.raises(ConfigError, match=f"token id {wrong} is not below the vocabulary's size 1000"):
        write(tmp_path, [[999], [5, wrong]], 1000)


def test_an_empty_split_is_a_file_too(tmp_path: Path) -> None:
    file = write(tmp_path, [], 1000)
    assert len(file.tokens) == 0 and file.offsets().tolist() == [0]


def test_a_token_file_travels_as_its_path(tmp_path: Path) -> None:
    file = write(tmp_path, [list(range(1000))] * 100, 1000)
    data = pickle.dumps(file)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).tokens, file.tokens)


def test_what_is_damaged_is_not_complete(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]], 1000)
    assert is_complete(tmp_path)
    manifest, tokens = tmp_path / "manifest.json", tmp_path / "train" / "00000.bin"
    whole, content = manifest.read_text(), tokens.read_bytes()
    for text in (whole[:50], "[]", json.dumps({**json.loads(whole), "format": FORMAT + 1})):
        manifest.write_text(text)
        assert not is_complete(tmp_path)
    manifest.write_text(whole)
    for cut in (content[:-1], content + b"x"):
        tokens.write_bytes(cut)
        assert not is_complete(tmp_path)
    tokens.unlink()
    assert not is_complete(tmp_path)
    assert not is_complete(tmp_path / "nowhere")
