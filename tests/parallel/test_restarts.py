"""Ranks that start again, and meet in a store that knows them from before."""

import torch.distributed as dist

from dsv3_lightning.parallel.attempt import QUESTIONS
from tests.parallel.conftest import on_ranks


def test_ranks_meet_again_after_a_restart_that_not_every_node_has_counted(tmp_path):
    """As under torchrun on several nodes: the store has what an earlier start left, and a question of a dead rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for start, count in (("first", "0"), ("second", "1")):
        outputs = on_ranks(
            2, tmp_path / start, ["tests.parallel.attempt_worker", start, count], timeout=120, **launcher
        )
        assert all(output.splitlines()[-2:] == [f"heard {start}", "ranks 2"] for output in outputs), outputs
        store.queue_push(QUESTIONS, "a rank that died")
