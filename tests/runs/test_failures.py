"""A failure is reported in one line: the file that could not be written, however deep in the chain it is."""

import errno
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from dsv3_lightning.errors import ConfigError, RunStopped, WriteError
from dsv3_lightning.runs.failures import in_one_line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device of a full disk is Linux's")
def test_a_full_disk_behind_the_event_files_names_them(tmp_path: Path):
    """TensorBoard's error has no path."""
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError) as raised:
        RecordWriter(file).write(b"event")
    reported = in_one_line(raised.value, tmp_path)
    assert isinstance(reported, WriteError)
    assert str(reported) == f"{tmp_path}/events.out.tfevents.*: can't be written (No space left on device)"


def test_a_full_disk_elsewhere_names_its_file_or_the_run(tmp_path: Path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a"))
    assert str(in_one_line(full, tmp_path)) == f"{tmp_path}/a: can't be written (No space left on device)"
    unnamed = OSError(errno.EFBIG, "File too large")
    assert str(in_one_line(unnamed, tmp_path)) == f"{tmp_path}: can't be written (File too large)"


@pytest.mark.parametrize("meant", [ConfigError("a=1: must be 2"), RunStopped("stopped by SIGTERM")])
def test_what_is_meant_for_users_is_not_hidden_by_what_follows_it(meant: Exception, tmp_path: Path):
    try:
        try:
            raise meant
        except Exception:
            raise NotImplementedError("Cannot copy out of meta tensor")  # noqa: B904  # as Lightning does
    except NotImplementedError as error:
        assert in_one_line(error, tmp_path) is meant


def test_other_errors_stay_what_they_are(tmp_path: Path):
    for error in (KeyError("x"), OSError(errno.ENOENT, "No such file or directory", "a")):
        assert in_one_line(error, tmp_path) is error
