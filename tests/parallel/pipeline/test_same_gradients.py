"""Pipelines give the losses, every gradient and the weights of one process, whatever the schedule.

With clipping, sequence- and batch-wise losses, MTP of one and two modules, bias updates, and uneven numbers of valid
targets. `benchmarks/pipelines.py` has every case, over 20 steps.
"""

import pytest

from tests.parallel.pipeline.cases import case, compare, make_runs

STEPS = 6
CASES = {
    "zbv on 2": case(2, "zbv"),
    "dualpipev on 2": case(2, "dualpipev", "depth2", "selective"),
    "interleaved_zero_bubble on 2": case(2, "interleaved_zero_bubble", checkpointing="full"),
    "interleaved_1f1b on 2": case(2, "interleaved_1f1b", "dense"),
    "1f1b on 2": case(2, "1f1b", "depth2"),
    "zbv on 4": case(4, "zbv", checkpointing="selective"),
    "dualpipev on 4": case(4, "dualpipev"),
    "zbv on 2 x fsdp2": case(4, "zbv", "depth2", stages=2),
    "dualpipev on 2 x ep2": case(4, "dualpipev", checkpointing="full", mesh="ep2", stages=2),
    "1f1b on 2 x hsdp": case(4, "1f1b", mesh="hsdp", stages=2),
}
pytestmark = pytest.mark.timeout(900)  # many runs, made before the first test


@pytest.fixture(scope="module")
def runs(shared_nano):
    return make_runs(shared_nano, CASES, STEPS)


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(runs, shared_nano, name):
    error = compare(shared_nano, runs, name, CASES[name].model, STEPS)
    assert error < 5e-5, f"a gradient or weight differs by {error:.1e} of its norm"
