"""The index is made once and shared: what is found is used, what is damaged is made again, none of it is in memory."""

import hashlib
import mmap
import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3_lightning.data.batches import index
from dsv3_lightning.data.batches.index import ARRAYS, Cut, MappedIndex, open_index, prepare_index
from dsv3_lightning.data.batches.module import TextDataModule
from dsv3_lightning.data.batches.packing import pack
from dsv3_lightning.data.batches.sampling import Layout, TrainSampler
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.text.store import FORMAT, write_manifest

Make = Callable[..., TextDataModule]


@pytest.fixture
def own(config: DataConfig, tmp_path: Path) -> DataConfig:
    """The corpus, prepared in a folder that a test may spoil."""
    return replace(config, cache_dir=str(tmp_path / "cache"))


def batches_of(module: TextDataModule) -> list[dict[str, torch.Tensor]]:
    return [*module.train_dataloader(), *module.val_dataloader()]


def same(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(first, second, strict=True)
    )


def is_mapped(array: np.ndarray) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


def test_the_second_start_uses_what_the_first_made(
    own: DataConfig, make_module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_module(own)
    monkeypatch.setattr(index, "pack", None)
    second = make_module(own)
    found = second._datasets["train"].index
    assert all(is_mapped(getattr(found, name)) for name in ARRAYS)
    assert same(batches_of(first), batches_of(second)) and first.state_dict() == second.state_dict()
    for change in ({"sequence_length": 64}, {"mask_document_ends": True}):  # another index, which isn't there
        with pytest.raises(TypeError):
            make_module(replace(own, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["samples.npy", "starts.npy", "target_counts.npy", "digest"])
@pytest.mark.parametrize("damage", ["gone", "cut", "other", "empty"])
def test_a_damaged_one_is_made_again(own: DataConfig, make_module: Make, name: str, damage: str) -> None:
    first = make_module(own)
    batches, state = batches_of(first), first.state_dict()
    path = Cut(own.sequence_length, 1, False).folder(first.prepared, "train") / name
    whole = path.read_bytes()
    path.unlink()  # the file that `first` has mapped stays what it was
    if damage == "other" and name == "digest":
        path.write_text("x", encoding="utf-8")
    elif damage == "other":
        np.save(path, np.arange(5))
    elif damage != "gone":
        path.write_bytes(whole[:-8] if damage == "cut" else b"")
    second = make_module(own)
    assert path.read_bytes() == whole
    assert same(batches, batches_of(second)) and second.state_dict() == state
    assert isinstance(second._datasets["train"].index, MappedIndex)


def test_it_is_hashed_when_it_is_built_and_not_read_at_a_start(
    own: DataConfig, make_module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_module(own)
    found = first._datasets["train"].index
    assert isinstance(found, MappedIndex)
    expected = hashlib.blake2b(digest_size=8)
    for name in ("samples", "starts", "lengths"):
        expected.update(np.load(found.folder / f"{name}.npy").tobytes())
    assert found.digest() == (found.folder / index.DIGEST).read_text() == expected.hexdigest()
    state = first.state_dict()

    class Unread(np.ndarray):
        """An array that tells no more than its ends."""

        @property
        def data(self) -> memoryview:
            raise AssertionError("read whole")

        def __getitem__(self, key: object) -> object:
            assert isinstance(key, int), f"read at {key}"
            return super().__getitem__(key)

    monkeypatch.setattr(index, "open_memmap", lambda path, mode: np.load(path, mmap_mode=mode).view(Unread))
    monkeypatch.setattr(index.np, "asarray", lambda array: array)
    second = make_module(own)
    assert second.state_dict() == state and type(second._datasets["train"].index.starts) is Unread
    second.train_dataloader()
    with pytest.raises(AssertionError, match="read at"):
        next(iter(second.train_dataloader()))


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_where_it_cannot_be_written_every_process_packs(
    own: DataConfig, make_module: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_module(own)
    batches, state = batches_of(first), first.state_dict()
    folder = Cut(own.sequence_length, 1, False).folder(first.prepared, "train")
    (folder / "starts.npy").unlink()
    monkeypatch.setattr("os.posix_fallocate", full)
    capsys.readouterr()
    second = make_module(own)
    assert "No space left on device; every process packs the documents" in capsys.readouterr().err
    assert not isinstance(second._datasets["train"].index, MappedIndex)
    assert same(batches, batches_of(second)) and second.state_dict() == state


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        index.new_file(tmp_path / "x.npy", (3,), np.int64)


def test_it_travels_as_its_path(own: DataConfig, make_module: Make) -> None:
    found = make_module(own)._datasets["train"].index
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).starts, found.starts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["equal", "mixed"])
def test_memory_does_not_grow_with_the_documents(tmp_path: Path, kind: str) -> None:
    """A million documents, of 1,003 tokens or of all lengths. Built in one piece it would be 124 bytes for each."""
    documents, rng = 1_000_000, np.random.default_rng(0)
    lengths = np.full(documents, 1003) if kind == "equal" else rng.lognormal(np.log(600), 1.0, documents).astype(int)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "00000.bin").touch()
        (offsets if split == "train" else offsets[:1]).astype("<u8").tofile(tmp_path / split / "00000.idx")
    paths = [tmp_path / split / f"00000.{end}" for split in ("train", "validation") for end in ("bin", "idx")]
    files = {path.relative_to(tmp_path).as_posix(): {"bytes": path.stat().st_size} for path in paths}
    write_manifest(tmp_path, {"format": FORMAT, "dtype": "<u2", "files": files})

    tracemalloc.start()
    prepare_index(tmp_path, {"train": Cut(4096, 1, False)})
    built = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    found = open_index(tmp_path, "train", Cut(4096, 1, False))
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.reset_peak()
    assert found is not None
    next(iter(TrainSampler(len(found), Layout(8), 1, 10)))
    drawn = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()

    chunk = 40e6  # of pieces, whatever the corpus
    assert built < chunk + 24 * len(found) and kept < 100_000 and drawn < 1e6
    print(f"{kind}: {built / documents:.1f} B per document at the peak, {kept} B kept, {len(found)} samples")
    names = {path.name for path in Cut(4096, 1, False).folder(tmp_path, "train").iterdir()}
    assert names == {f"{name}.npy" for name in ARRAYS} | {index.DIGEST}
    expected = pack(offsets, 4096, 1)
    assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in ARRAYS)
