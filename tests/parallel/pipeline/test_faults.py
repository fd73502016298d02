"""A rank of a pipeline that dies in the middle of a schedule; `benchmarks/pipelines.py` has every kind of action."""

import torch

from dsv3_lightning.parallel.checkpoints.one_file import read_checkpoint
from tests.parallel.pipeline.faults import kill_once, killer, pipeline_under_torchrun

KILLS = [(2, "F", 1), (4, "SEND_B", 1), (5, "REDUCE_GRAD", 0)]


def test_killed_in_its_actions_a_run_ends_with_the_weights_of_the_undisturbed_one(shared_nano):
    folder = shared_nano.base / "killed"
    alone = pipeline_under_torchrun(shared_nano, "alone", 2, "zbv", 6)
    killed = pipeline_under_torchrun(shared_nano, "killed", 2, "zbv", 6, killer(folder, KILLS))
    assert (alone.code, killed.code) == (0, 0), killed.output[-6000:]
    assert len(list(folder.iterdir())) == len(KILLS)
    one, other = (read_checkpoint(run.folder / "checkpoints/step=6.ckpt")["state_dict"] for run in (alone, killed))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_rank_that_dies_while_it_sends_takes_the_others_with_it_and_is_named(shared_nano):
    line, seconds = kill_once(shared_nano, "dying", 2, "dualpipev", "SEND_F", 1)
    ours = "dsv3: rank 0 stops: rank 1 is gone (killed by SIGKILL); the same command resumes from the newest checkpoint"
    assert (line == ours or line.startswith("[rank: 1] Child process")) and seconds < 60
