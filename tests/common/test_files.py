"""Files are written whole or not at all, with the umask's mode, and a failed write is one line."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3_lightning.common.files import os_error, put_in_place, remove_leftovers, whole, write_file
from dsv3_lightning.common.numbers import read_numbers, write_numbers
from dsv3_lightning.errors import WriteError
from dsv3_lightning.parallel.checkpoints.names import remove_unfinished
from dsv3_lightning.parallel.checkpoints.one_file import AtomicCheckpointIO

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As `ulimit -f` sets it; Python ignores the signal, so that writing fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_and_a_folder_appear_whole_with_the_umasks_mode(tmp_path: Path, umask: None):
    record = write_file(tmp_path / "a/b.txt", "ü")
    assert (tmp_path / "a/b.txt").read_bytes() == "ü".encode() and record["bytes"] == 2
    with whole(tmp_path / "folder") as beside:
        (beside / "deep").mkdir(parents=True)
        (beside / "deep/file").touch(mode=0o600)
        assert not (tmp_path / "folder").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]
    assert mode(tmp_path / "a/b.txt") == mode(tmp_path / "folder/deep/file") == 0o640
    assert mode(tmp_path / "folder") == 0o750


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_what_fails_leaves_the_old_one_and_nothing_beside(tmp_path: Path, error: BaseException):
    write_file(tmp_path / "x", "old")
    with pytest.raises((WriteError, KeyboardInterrupt)) as failed, whole(tmp_path / "x") as beside:
        beside.write_text("new")
        raise error
    if error is FULL:
        assert str(failed.value) == f"{tmp_path / 'x'}: can't be written (No space left on device)"
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


def test_a_failure_inside_of_a_folder_names_the_folder_that_was_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise FULL

    with pytest.raises(WriteError) as failed, whole(tmp_path / "out") as beside:
        beside.mkdir()
        monkeypatch.setattr(Path, "write_bytes", full)
        write_file(beside / "config.json", "{}")
    assert str(failed.value) == f"{tmp_path / 'out'}: can't be written (No space left on device)"


def test_nothing_of_others_is_removed(tmp_path: Path):
    for name in ("x.new", "x.old"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        with whole(tmp_path / "x") as beside:
            beside.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.new", "x.old"]


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(tmp_path: Path):
    (tmp_path / "step").mkdir()
    (tmp_path / "step/file").touch()
    for _ in range(2):
        with whole(tmp_path / "last") as beside:
            beside.symlink_to("step")
    assert (tmp_path / "last").is_symlink() and (tmp_path / "last/file").exists()


def test_a_device_and_a_link_stay_what_they_are(tmp_path: Path):
    write_file(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").touch()
    write_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    with pytest.raises(WriteError, match="^/dev/full: can't be written .No space left on device.$"):
        write_file(Path("/dev/full"), "text")


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path: Path):
    for name in (".x.abc.new", ".y.abc.new", "step=4.ckpt.new", "step=3.ckpt.old", "mine.new", "mine.old"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "x")
    assert not (tmp_path / ".x.abc.new").exists() and (tmp_path / ".y.abc.new").exists()
    remove_leftovers(tmp_path)
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.new", "mine.old"]


def test_a_path_through_a_file_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/x: can't be written \((Not a directory|File exists)\)$"):
        write_file(tmp_path / "file/x", "text")


def test_files_beyond_the_limit_are_one_line(tmp_path: Path):
    """Of bytes, numbers and tensors: each library reports it differently."""
    numbers, tensors = np.zeros(1 << 16), {"state_dict": {"w": torch.zeros(1 << 16)}}
    writers = {
        "bytes": lambda path: write_file(path, bytes(1 << 18)),
        "numbers": lambda path: write_numbers(path, numbers),
        "tensors": lambda path: AtomicCheckpointIO().save_checkpoint(tensors, path),
    }
    for name, write in writers.items():
        with largest_file(100 << 10), pytest.raises(WriteError) as failed:
            write(tmp_path / name)
        assert str(failed.value) == f"{tmp_path / name}: can't be written (File too large)"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3).T, np.float32(3.5), np.empty((0, 2))])
def test_numbers_come_back(tmp_path: Path, array: np.ndarray):
    write_numbers(tmp_path / "x.npy", array)
    again = read_numbers("--x", tmp_path / "x.npy")
    assert np.array_equal(again, array) and again.dtype == np.asarray(array).dtype


def test_the_first_cause_is_found():
    try:
        try:
            raise FULL
        except OSError:
            raise RuntimeError("unexpected pos")  # noqa: B904  # as torch does
    except RuntimeError as error:
        assert os_error(error) is FULL
    assert os_error(RuntimeError()) is None


def test_a_folder_is_put_in_place_of_another(tmp_path: Path):
    for name in ("x", "x.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    put_in_place(tmp_path / "x.new", tmp_path / "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "x.new"]
