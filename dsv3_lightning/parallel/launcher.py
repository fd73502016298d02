"""Lightning's launcher of a node's other ranks, with more patience once one of them has died."""

import os
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver, _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

PATIENCE = 20.0  # seconds


class PatientObserver(_ChildProcessObserver):
    """Ends this process and its children PATIENCE seconds after a child's death, if they are still there.

    The death of a rank reaches this process by its next collective, from which it says in one line why it stops. By
    itself Lightning kills it at the observer's next look, up to 5 s later, on a busy machine before it could say so.
    """

    def _run(self) -> bool:
        if any(process.poll() for process in self._child_processes):
            time.sleep(PATIENCE)
        return super()._run()


class PatientLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this node, as Lightning does, and watches them by a PatientObserver."""

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self._call_children_scripts()
        PatientObserver(os.getpid(), self.procs).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)
