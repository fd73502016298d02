"""The DataLoader of a run, whose worker processes outlive the signals that ask the run to stop."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dsv3_lightning.data.batches.dataset import PackedDataset
from dsv3_lightning.data.batches.sampling import TrainSampler, ValidationSampler


class Loader:
    """A DataLoader that Lightning uses unchanged, without replacing the sampler or warning about workers.

    Starting it draws no global random number, which would make a resumed run differ. Its position is part of the
    module's state, and the sampler is in this process: workers only gather, so their number changes no batch.
    wait_seconds: time that the consumer has spent waiting for batches.
    """

    def __init__(self, dataset: PackedDataset, sampler: TrainSampler | ValidationSampler, num_workers: int) -> None:
        self.wait_seconds = 0.0
        self.batches = DataLoader(
            dataset,
            batch_size=None,  # the dataset makes whole micro-batches
            sampler=sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
            worker_init_fn=outlive_signals,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batches = iter(self.batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def outlive_signals(worker: int) -> None:
    """Keeps a worker running when the run is asked to stop, since the run still finishes its step.

    Ctrl-C in a terminal and SLURM's signals reach workers, too. A worker ends with the loader, whose process sends it
    SIGTERM on exit and waits for it; only a SIGTERM from that process counts.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):  # Windows lacks some
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait_for_own_process, daemon=True).start()


def wait_for_own_process() -> None:
    """Ends this worker when the process that started it sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # another exit status is an error in the loader's process
