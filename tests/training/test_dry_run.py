"""A rank's step without numbers: what the plan says is what it holds, and nothing is left out."""

import math
import re

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from dsv3_lightning.cli import main
from dsv3_lightning.commands.plan_cluster import work_of
from dsv3_lightning.config.checks import mesh_strategy
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.parallel.groups import build_meshes
from dsv3_lightning.parallel.mesh import MeshShape, StrategyConfig, mesh_shape
from dsv3_lightning.parallel.sharding import shard_model
from dsv3_lightning.planning.cluster import rank_memory
from dsv3_lightning.training import dry_run as dry
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

CLUSTER = {"v2-lite-8": 8, "moonlight-16": 16, "v3-256": 256, "v3-2048": 2048}
# Wider than nano, so that the small things that no plan counts are small.
WIDE = ("model.hidden_size=256", "model.vocab_size=2048", "data.vocab_size=2048", "data.sequence_length=256",
        "data.batch_size=8", "trainer.precision=32")  # fmt: skip


def counted_and_planned(name, ranks, *overrides):
    config = check(compose([name], overrides).tree)
    strategy, work = mesh_strategy(config.strategy), work_of(config, ranks)
    shape = mesh_shape(strategy, ranks, math.gcd(ranks, 8), config.model)
    samples = work.tokens // work.sequence_length
    found = dry.dry_run(
        config.model, config.optimizer, strategy, shape, samples, work.sequence_length, work.precision, work.policy
    )
    return found, rank_memory(config.model, shape, strategy, work)


def nano(ranks, strategy, *overrides):
    """8 / `ranks` samples per rank."""
    return counted_and_planned("nano", ranks, *WIDE, f"strategy={strategy}", f"trainer.devices={ranks}", *overrides)


@pytest.mark.parametrize("name", CLUSTER)
def test_every_cluster_config_takes_a_step_in_the_memory_that_is_planned(name, capsys):
    """With fewer layers, and a shorter pipeline; `dsv3 plan configs/cluster/... --gpus N --dry-run` has them all."""
    layers = ["model.num_hidden_layers=2", "model.first_k_dense_replace=1"]
    if name == "v3-2048":
        layers = ["model.num_hidden_layers=4", "model.first_k_dense_replace=1",
                  "strategy.pipeline_parallel=2", "strategy.micro_batches=15", "data.batch_ramp=null"]  # fmt: skip
    words = [str(ROOT / f"configs/cluster/{name}.yaml"), *layers, "--gpus", str(CLUSTER[name]), "--dry-run"]
    assert main(["plan", *words]) == 0
    table = capsys.readouterr().out.split("dry run of rank ")[1].split("\n\n")[0]
    off = [float(value) for value in re.findall(r"([+-][\d.]+)%", table)]
    assert len(off) == 4 and max(map(abs, off[:3])) < 1.0 and abs(off[3]) < 10, (
        table
    )  # shards are of equal size: padded


@pytest.mark.parametrize("strategy", ["{kind: fsdp2}", "{kind: fsdp2_ep}"])
def test_memory_falls_with_ranks_as_planned(strategy):
    """The step is the same: twice the ranks have half the samples each."""
    counted, planned = zip(*(nano(ranks, strategy) for ranks in (1, 2, 4)), strict=True)
    for one, other in zip(counted, planned, strict=True):
        assert other.total == pytest.approx(one.peak, rel=0.1)
        assert other.optimizer == pytest.approx(one.optimizer, rel=0.01)
    assert counted[0].peak > 1.6 * counted[1].peak > 1.6 * 1.6 * counted[2].peak


def test_keeping_parameters_gathered_and_gathering_ahead_take_memory():
    large = ("model.num_hidden_layers=6", "model.intermediate_size=4096", "model.first_k_dense_replace=6",
             "model.num_nextn_predict_layers=0", "model.vocab_size=512", "data.vocab_size=512", "loss.balance=none",
             "compute.activation_checkpointing=full", "callbacks={expert_bias: null, router_monitor: null}",
             "callbacks.router_probe=null")  # fmt: skip
    peak = {name: nano(4, f"{{kind: fsdp2, {name}}}", *large)[0].peak
            for name in ("prefetch: 0", "prefetch: 2", "reshard_after_forward: false")}  # fmt: skip
    assert peak["prefetch: 0"] < peak["prefetch: 2"] < peak["reshard_after_forward: false"]


def test_no_parameter_is_left_unsharded(monkeypatch):
    """One that isn't a DTensor would get no gradient from other ranks, and break the norm of all."""
    seen = {}
    build = dry.build_optimizer

    def look(module, config, precision):
        seen.update({name: type(parameter) for name, parameter in module.named_parameters()})
        return build(module, config, precision)

    monkeypatch.setattr(dry, "build_optimizer", look)
    for strategy in ("{kind: hsdp, dp_shard: 2}", "{kind: fsdp2_ep, expert_parallel: 2}"):
        nano(4, strategy)
        assert len(seen) > 20 and set(seen.values()) == {torch.distributed.tensor.DTensor}, seen


def test_all_that_is_sharded_is_offloaded_where_that_is_asked_for():
    model = check(compose(["nano"]).tree).model
    strategy = StrategyConfig(kind="fsdp2_ep", cpu_offload=True)
    with dry.fake_process_group(2), torch.device("meta"):
        module = Transformer(model)
        shard_model(module, build_meshes(MeshShape(1, 2, 2), "cpu"), strategy, "bf16-true")
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in module.modules() if isinstance(unit, FSDPModule)]
    assert len(groups) > 5 and all(isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups)


def test_a_dry_run_of_no_mesh_is_refused(capsys):
    assert main(["plan", "nano", "--dry-run"]) == 2
    assert "--dry-run: needs the number of ranks; add --gpus N" in capsys.readouterr().err
