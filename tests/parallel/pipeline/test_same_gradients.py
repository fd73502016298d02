"""Pipelines give the losses, every gradient and the weights of one process, whatever the schedule.

With clipping, sequence- and batch-wise losses, MTP of one and two modules, bias updates, and uneven numbers of valid
targets. `benchmarks/pipelines.py` has every case, over 20 steps.
"""

import pytest

from dsv3_lightning.planning.pipeline.measured import read_trace
from tests.parallel.pipeline.cases import Case, case, compare, make_runs, resumed, traced
from tests.runs.compare import assert_same_curves

STEPS = 4
CASES = {
    "zbv on 2": case(2, "zbv", sharded=True),
    "dualpipev on 2": traced(case(2, "dualpipev", "short", "selective")),
    "interleaved_zero_bubble on 2": case(2, "interleaved_zero_bubble", checkpointing="full"),
    "interleaved_1f1b on 2": case(2, "interleaved_1f1b", "dense"),
    "1f1b on 2": case(2, "1f1b", "short"),
    "zbv on 4": case(4, "zbv", checkpointing="selective"),
    "dualpipev on 4": case(4, "dualpipev", waiting=1),
    "zbv on 2 x fsdp2": case(4, "zbv", "short", stages=2),
    "dualpipev on 2 x ep2": case(4, "dualpipev", checkpointing="full", mesh="ep2", stages=2, sharded=True),
    "dualpipev on 2 x ep2 in pairs": traced(case(4, "dualpipev", "short", "selective", "ep2 in pairs", 2)),
    "1f1b on 2 x hsdp": case(4, "1f1b", mesh="hsdp", stages=2),
}
ALONE, EP2 = Case(1, "depth1", ()), Case(2, "depth1", ("strategy={kind: fsdp2_ep, sharded_checkpoints: true}",))
RESUMED = {
    "1 -> 2 stages": resumed("depth1", 2, case(2, "zbv")),
    "2 stages -> 1": resumed("zbv on 2", 2, ALONE),
    "2 stages -> 4": resumed("zbv on 2", 2, case(4, "dualpipev", sharded=True)),
    "4 stages -> 2": resumed("zbv on 4", 2, case(2, "1f1b", sharded=True)),
    "2 stages x ep2 -> ep2": resumed("dualpipev on 2 x ep2", 2, EP2),
}
pytestmark = pytest.mark.timeout(900)  # many runs, made before the first test


@pytest.fixture(scope="module")
def runs(shared_nano):
    return make_runs(shared_nano, CASES, STEPS, RESUMED)


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(runs, shared_nano, name):
    error = compare(shared_nano, runs, name, CASES[name].model, STEPS)
    assert error < 5e-5, f"a gradient or weight differs by {error:.1e} of its norm"


def test_paired_passes_run_together(runs):
    """In the trace, whose slots are passes that overlap in time."""
    for name, paired in (("dualpipev on 2 x ep2 in pairs", True), ("dualpipev on 2", False)):
        (timeline, *_) = read_trace(runs[name].folder).values()
        together = [slot for events in timeline.ranks for slot, _, _ in events if len(slot) > 1]
        assert all(sorted(action.kind for action in slot) == ["B", "F"] for slot in together)
        assert bool(together) == paired


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_any_other_number_of_stages(runs, name):
    """From a file or a folder of shards, on fewer, more or no stages."""
    assert_same_curves(runs["depth1"], runs[name], 1e-5, after=RESUMED[name][1])
