"""Checkpoint files: in place of whatever had their name, and judged without holding them."""

from types import SimpleNamespace

import pytest
import torch

from dsv3_lightning.callbacks.checkpoint import Checkpoint
from dsv3_lightning.common.files import put_in_place
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.checkpoints.names import best_name
from dsv3_lightning.parallel.checkpoints.one_file import PARTS, AtomicCheckpointIO, step_of


@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_what_was_written_beside_takes_the_place_of_whatever_is_there(tmp_path, before, after):
    def make(path, kind):
        if kind == "file":
            path.write_text("content")
        elif kind == "folder":
            path.mkdir()
            (path / "part").write_text("content")

    path, beside = tmp_path / "step=4.ckpt", tmp_path / "step=4.ckpt.new"
    make(path, before)
    make(beside, after)
    (beside / "more" if after == "folder" else beside).write_text("newer")
    put_in_place(beside, path)
    assert [file.name for file in tmp_path.iterdir()] == ["step=4.ckpt"]
    assert (path / "more" if after == "folder" else path).read_text() == "newer"


def checkpoint_file(path):
    checkpoint = dict.fromkeys(PARTS, 0) | {"global_step": 7, "TextDataModule": {"next_sample": 3}}
    AtomicCheckpointIO().save_checkpoint(checkpoint | {"state_dict": {"w": torch.full((1 << 18,), 1.5)}}, path)
    return path


def test_a_file_with_a_changed_number_is_not_gone_on_from(tmp_path):
    path = checkpoint_file(tmp_path / "step=7.ckpt")
    assert step_of(path) == 7
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert step_of(path, thorough=False) == 7  # which reads no tensor
    with pytest.raises(ConfigError, match="differs from its checksum"):
        step_of(path)


def test_a_file_is_judged_without_its_tensors_in_memory(tmp_path, monkeypatch):
    path, load, mapped = checkpoint_file(tmp_path / "step=7.ckpt"), torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **options: (mapped.append(options["mmap"]), load(*a, **options))[1])
    assert step_of(path) == 7 and mapped == [True]


def test_checkpoints_of_later_steps_neither_count_nor_go(tmp_path):
    """A damaged one of a later step must not push the good ones out."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (2, 4, 6, 9):
        (folder / f"step={step}.ckpt").touch()
    trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True)
    Checkpoint(every_n_steps=2, keep=1, keep_best=0).tidy(trainer, 6)
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=6.ckpt", "step=9.ckpt"]
    assert (folder / "last.ckpt").resolve().name == "step=6.ckpt"


@pytest.mark.parametrize("first_sees, saved", [(4.5, []), (None, ["best-step=9-loss=4.7500.ckpt"])])
def test_whether_a_checkpoint_is_among_the_best_is_for_the_first_rank_to_say(tmp_path, first_sees, saved):
    """Another may not see yet, or see already, what is being written; a save that only some ranks begin never ends."""
    written = []
    trainer = SimpleNamespace(
        default_root_dir=tmp_path, global_step=9, is_global_zero=False, loggers=[],
        callback_metrics={}, state=SimpleNamespace(fn="fit"),
        lightning_module=SimpleNamespace(scalars={"val/loss": 4.75}, steps_done=9),
        strategy=SimpleNamespace(broadcast=lambda worse: first_sees is not None),
        save_checkpoint=lambda path, weights_only: written.append(path.name),
    )  # fmt: skip
    if first_sees is None:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / best_name(6, 4.5)).touch()
    Checkpoint(every_n_steps=2, keep=1, keep_best=1).save_if_best(trainer)
    assert written == saved
