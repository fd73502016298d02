"""What else a run does, in a pipeline of two ranks as on one process."""

import math

import pytest
import torch

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.checkpoints.one_file import read_checkpoint
from dsv3_lightning.parallel.pipeline.pipeline import refuse_compiled
from tests.conftest import Run
from tests.parallel.conftest import runs_on_ranks
from tests.parallel.pipeline.cases import COMMON
from tests.parallel.small import config
from tests.runs.compare import assert_same_curves
from tests.runs.test_non_finite import POISON

SHORT = (*COMMON[:-2], "callbacks.sample_text=null", "trainer.max_steps=4", "trainer.val_check_interval=4",
         "callbacks.checkpoint={every_n_steps: 4, keep: 1, keep_best: 0}")  # fmt: skip
CASES = {  # settings of both runs
    "ramp": ("data.batch_ramp={start: 2, increment: 2, tokens: 384}", "data.isolate_documents=true",
             "callbacks.mtp_weight={by: tokens, schedule: [[0, 0.3], [200, 0.1]]}"),
    "bf16": ("trainer.precision=bf16",),
    "mixed": ("trainer.precision=bf16-mixed", "compute.activation_checkpointing=selective"),
    "fp8": ("trainer.precision=bf16", "compute.fp8=emulated", "compute.activation_checkpointing=selective"),
    "four_chunks": (),  # on each rank, which torch's runtime gathers three at a time
    "parallel_heads": ("model.mtp_kind=parallel", "model.num_nextn_predict_layers=2"),
}  # fmt: skip
TWO = ("trainer.devices=2", "strategy={kind: fsdp2, pipeline_parallel: 2, micro_batches: 4, sharded_checkpoints: true}")
FOUR_CHUNKS = ("strategy={kind: fsdp2, pipeline_parallel: 2, schedule: interleaved_zero_bubble, "
               "stages: [1, 1, 1, 1, 1, 1, 1, 1], micro_batches: 4}")  # fmt: skip
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def runs(shared_nano):
    start = {"started": (f"init_from={shared_nano.base / 'runs/ramp_1'}",)}
    for name, words in (CASES | start).items():
        assert shared_nano.run(f"{name}_1", *SHORT, *words).code == 0
    words = {f"{name}_2": (*SHORT, *words, *TWO) for name, words in (CASES | start).items()}
    words["four_chunks_2"] = (*SHORT, TWO[0], FOUR_CHUNKS)
    words["skips"] = (*SHORT, *TWO, POISON.format(rank=1, step=2, onwards="false"))
    output = runs_on_ranks(2, shared_nano, words)
    (shared_nano.base / "output").write_text(output[0])
    names = [*(f"{name}_1" for name in CASES | start), *words]
    return {name: Run(shared_nano.base / "runs" / name, 0) for name in names}


@pytest.mark.parametrize(
    ("name", "rtol"), [("ramp", 2e-5), ("four_chunks", 2e-5), ("parallel_heads", 2e-5), ("started", 2e-5)]
)
def test_curves_are_those_of_one_process(runs, name, rtol):
    """A batch that grows, so that the pipeline has more micro-batches; documents; a run that starts from another."""
    assert_same_curves(runs[f"{name}_1"], runs[f"{name}_2"], rtol)


@pytest.mark.parametrize("name", ["bf16", "mixed", "fp8"])
def test_bf16_and_fp8_learn_as_on_one_process(runs, name):
    one, two = (runs[f"{name}_{ranks}"].scalars() for ranks in (1, 2))
    for tag, rtol in (("loss/main", 2e-3), ("loss/mtp_1", 2e-3), ("optimizer/grad_norm", 3e-2)):
        assert two[tag][1] == pytest.approx(one[tag][1], rel=rtol), tag


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(runs, shared_nano):
    assert runs["skips"].report()["skipped_steps"] == 1 and math.isfinite(runs["skips"].report()["val_loss"])
    state = read_checkpoint(runs["skips"].folder / "checkpoints/step=4.ckpt")
    steps = {float(values["step"]) for values in state["optimizer_states"][0]["state"].values()}
    assert steps == {3.0} and all(bool(torch.isfinite(value).all()) for value in state["state_dict"].values())
    assert (shared_nano.base / "output").read_text().count("is not finite") == 1


def test_a_compiled_module_is_refused_where_the_backward_pass_is_split():
    with torch.device("meta"):
        model = Transformer(config(num_hidden_layers=4))
    refuse_compiled(model, "zbv")
    model.layers[1].compile()
    with pytest.raises(
        ConfigError, match=r"^strategy.schedule=zbv: splits the backward pass, .* \(layers.1 is compiled"
    ):
        refuse_compiled(model, "zbv")
