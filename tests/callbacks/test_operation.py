"""Garbage is collected at fixed steps, and running out of CUDA's memory leaves a file."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from dsv3_lightning.callbacks import GarbageCollection, MemorySnapshot
from dsv3_lightning.errors import ConfigError


class Circle:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.self = self


def trainer(step=0, folder="."):
    return SimpleNamespace(global_step=step, global_rank=3, accumulate_grad_batches=2, is_last_batch=False,
                           default_root_dir=folder)  # fmt: skip


def test_garbage_goes_at_the_named_steps_and_at_no_other_time():
    callback = GarbageCollection(every_n_steps=3)
    callback.on_train_start(trainer(), None)
    try:
        assert not gc.isenabled()
        alive = weakref.ref(Circle())
        for batch_idx in range(6):  # two micro-batches to a step
            assert alive() is not None
            callback.on_train_batch_end(trainer((batch_idx + 1) // 2), None, None, None, batch_idx)
        assert alive() is None
    finally:
        callback.teardown(trainer(), None, "fit")
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_validation_alone_leaves_the_collector_as_it_was():
    GarbageCollection().teardown(trainer(), None, "validate")
    assert gc.isenabled()


@pytest.fixture
def dumps(monkeypatch):
    """The files that torch would write, and the calls that switch its history on and off."""
    made = []
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", made.append)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **arguments: made.append(arguments))
    return made


GPU, CPU = (SimpleNamespace(device=torch.device(kind)) for kind in ("cuda", "cpu"))


def test_out_of_memory_on_cuda_leaves_a_file_with_step_and_rank(tmp_path, dumps, capsys):
    callback = MemorySnapshot()
    callback.on_fit_start(trainer(), GPU)
    error = RuntimeError("in a backward pass")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    callback.on_exception(trainer(12, tmp_path), GPU, error)
    assert dumps == [str(tmp_path / "out-of-memory-step=12-rank=3.pickle")]
    assert f"rank 3: out of memory; a snapshot of it is in {dumps[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("module, error", [(CPU, torch.OutOfMemoryError("")), (GPU, RuntimeError("out of memory"))])
def test_other_errors_and_devices_leave_none(tmp_path, dumps, module, error):
    MemorySnapshot().on_exception(trainer(12, tmp_path), module, error)
    assert dumps == []


def test_history_is_recorded_on_cuda_for_as_long_as_the_run(dumps):
    callback = MemorySnapshot(history=1000)
    callback.on_fit_start(trainer(), CPU)
    assert dumps == []
    callback.on_fit_start(trainer(), GPU)
    callback.teardown(trainer(), GPU, "fit")
    assert dumps == [{"max_entries": 1000, "stacks": "python"}, {"enabled": None}]


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="^callbacks.garbage_collection.every_n_steps=0: must be at least 1$"):
        GarbageCollection(every_n_steps=0)
    with pytest.raises(ConfigError, match=r"^callbacks.memory_snapshot.history=-1: must be at least 0 \(0 records no"):
        MemorySnapshot(history=-1)
