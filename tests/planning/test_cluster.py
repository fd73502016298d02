"""A rank's memory, the wires and the time, against numbers worked out by hand and published ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.model import cpu
from dsv3_lightning.parallel.mesh import KINDS, MeshShape, StrategyConfig
from dsv3_lightning.planning.cluster import MAX_LOGITS, rank_memory
from dsv3_lightning.planning.hardware import GPU, GPUS, Hardware
from dsv3_lightning.planning.layout import FIRST, Layout, Work
from dsv3_lightning.planning.parameters import parameter_split
from dsv3_lightning.planning.wires import offloading, traffic
from tests.conftest import ROOT

CLUSTER = sorted((ROOT / "configs/cluster").glob("*.yaml"))
FSDP = StrategyConfig(kind="fsdp2_ep")
V3 = check(compose(["v3"]).tree).model
WORK = Work(tokens=4096, micro_batches=2, sequence_length=4096, precision="bf16", policy="full")


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_every_cluster_config_fits_as_it_is_planned(path: Path, capsys: pytest.CaptureFixture[str]):
    config = check(compose([str(path)]).tree)
    ranks = config.trainer["devices"] * config.trainer["num_nodes"]
    assert path.stem.endswith(f"-{ranks}")
    assert main(["plan", str(path), "--gpus", str(ranks), "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "fits in 80 GB" in shown and f"{ranks:,} H100" in shown


def test_there_are_configs_for_8_to_2048_gpus():
    assert [path.stem for path in CLUSTER] == ["moonlight-16", "v2-lite-8", "v3-2048", "v3-256"]


@pytest.mark.slow
def test_v3_on_2048_gpus_shows_its_estimate_beside_the_published_hours(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(ROOT / "configs/cluster/v3-2048.yaml"), "--gpus", "2048", "--gpu", "h800"]) == 0
    shown = capsys.readouterr().out
    assert "180,000" in shown and "386.5 TFLOP/s" in shown  # 250.45 GFLOP/token · 1e12 / (180e3 · 3600 s), §1 table 1


def test_the_plan_says_that_nothing_was_measured_and_lists_its_sources(capsys: pytest.CaptureFixture[str]):
    words = ["plan", str(ROOT / "configs/cluster/v2-lite-8.yaml"), "--gpus", "8", "--sources"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "not measured on a GPU: all" in shown and "assumed" not in shown
    parts = shown.split("a step by part, slowest rank")[1].split("\n\n")[0].splitlines()[1:]
    shares = [float(line.split()[-1].rstrip("%")) for line in parts if line.endswith("%")]
    assert sum(shares[:-1]) == pytest.approx(100, abs=1) and shares[-1] == 100
    listed = [line for line in shown.split("coefficient  ")[1].splitlines() if "estimate: " in line]
    assert len(listed) > 5 and all(" no  " in line for line in listed)
    header = next(line for line in shown.splitlines() if line.startswith("coefficient  "))
    assert {line.index("estimate: ") for line in listed} == {header.index("source")}  # text is aligned left


def test_a_batch_that_grows_makes_the_run_shorter(capsys: pytest.CaptureFixture[str]):
    def hours(*overrides: str) -> tuple[int, ...]:
        words = ["plan", str(ROOT / "configs/cluster/v2-lite-8.yaml"), "--gpus", "8", "--gpu", "h100"]
        assert (
            main(
                [
                    *words,
                    "data.batch_size=6144",
                    "trainer.accumulate_grad_batches=192",
                    "trainer.max_steps=1000",
                    *overrides,
                ]
            )
            == 0
        )
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GPU hours")]
        return tuple(int(row.split()[-1].replace(",", "")) for row in rows)

    tokens = 6144 * compose([str(ROOT / "configs/cluster/v2-lite-8.yaml")]).tree["data"]["sequence_length"] * 1000
    (each, even), (same, grown) = hours(), hours(f"data.batch_ramp={{start: 1536, increment: 1536, tokens: {tokens}}}")
    assert each == same and even > 100
    # of `tokens` a third comes in steps of 1,536: 1,333 of them, so the run ends in that third
    assert grown == pytest.approx(even / 4, rel=0.01)


def test_shares_are_the_whole_over_the_ranks():
    memory = rank_memory(V3, MeshShape(8, 256, 64), FSDP, WORK)
    total = 671_026_404_352 + 11_610_068_224 - 256  # FACTS: main model and MTP module, without its bias
    assert memory.weights == pytest.approx(4 * total / 256, rel=1e-5)  # fp32, gathered in bf16
    assert memory.gradients == pytest.approx(4 * total / 256, rel=1e-5)
    assert memory.optimizer == pytest.approx(8 * total / 256, rel=1e-5)  # two moments
    rounded = rank_memory(V3, MeshShape(8, 256, 64), FSDP, replace(WORK, moment=2))
    assert rounded.optimizer == pytest.approx(4 * total / 256, rel=1e-5)


def test_what_is_offloaded_is_on_the_host_and_travels():
    """V3 on 2,048 ranks: 16 bytes per parameter leave the GPU; each pass fetches them in fp32, as gradients go back."""
    shape, offloading_ = MeshShape(1, 2048, 64), StrategyConfig(kind="fsdp2_ep", cpu_offload=True)
    here, there = (rank_memory(V3, shape, strategy, WORK) for strategy in (FSDP, offloading_))
    own = sum(parameter_split(V3)) / 2048
    assert there.kept == pytest.approx(16 * own, rel=1e-5)
    assert here.total - there.total == pytest.approx(16 * own, rel=1e-5) and there.gathered == here.gathered
    hardware = Hardware(replace(GPUS["h800"], host=100.0))
    moved = traffic(V3, hardware, Layout(shape, offloading_, WORK, FIRST)).host
    assert moved == pytest.approx(2 * (2 * 4 + 4) * own)  # two micro-batches
    (part,) = offloading(V3, hardware, Layout(shape, offloading_, WORK, FIRST))
    assert part.seconds == pytest.approx(moved / (100 * 0.8)) and part.hidden_under
    assert offloading(V3, hardware, Layout(shape, FSDP, WORK, FIRST)) == []


def test_the_plan_shows_the_host_every_policy_and_takes_bandwidths(capsys: pytest.CaptureFixture[str]):
    def shown(*words: str) -> str:
        assert main(["plan", str(ROOT / "configs/cluster/v2-lite-8.yaml"), "--gpus", "8", *words]) == 0
        return capsys.readouterr().out

    def seconds(text: str) -> float:
        line = next(line for line in text.splitlines() if line.startswith("tokens to experts and back"))
        return float(line.split()[-3])

    plain, wired = shown(), shown("--inside", "45")  # where an all-to-all is planned to reach 0.71 of 450
    assert seconds(wired) == pytest.approx(7.1 * seconds(plain), rel=0.05)
    policies = [line.split() for line in plain.splitlines() if line.split(" ")[0] in ("none", "selective", "full")]
    assert [row[0] for row in policies] == ["none", "selective", "full"]
    held, step = ([float(row[column]) for row in policies] for column in (1, -2))
    assert held[0] > held[1] > held[2] and step[0] < step[1] < step[2] < step[0] * 4 / 3
    offloaded = shown("strategy.cpu_offload=true")
    assert "exact, on the host" in offloaded and "sum on the host" in offloaded
    assert "parameters from the host" in offloaded and "parameters from the host" not in plain


def test_bytes_on_the_wires_are_those_of_rings_and_of_all_to_alls():
    """Two nodes of two GPUs, experts over all four: 1/4 of the routed tokens stay in the node, 2/4 leave it."""
    hardware = Hardware(GPU(peak=1e12, peak_fp32=1e12, memory=1e9, inside=100.0, between=10.0, per_node=2))
    dense, routed = parameter_split(V3)
    assert routed == 59 * 256 * 3 * 7168 * 2048
    found = traffic(V3, hardware, Layout(MeshShape(1, 4, 4), FSDP, WORK, FIRST))
    gathered = 2 * (2 * 2 + 4) * dense * 3 / 4  # micro-batches, bf16 twice and fp32 once, ring of four
    assert found.parameters == pytest.approx(gathered)  # an expert is on one rank alone
    routed_tokens = 2 * 4096 * 8 * 59 * 7168 * 2 * 6  # there and back three times: forward, recomputed, backward
    assert found.tokens == pytest.approx(routed_tokens * 3 / 4)
    assert found.tokens_between == pytest.approx(routed_tokens * 2 / 4)


def test_replicas_add_their_parts_of_the_gradients():
    found = traffic(V3, Hardware(GPUS["h100"]), Layout(MeshShape(2, 4, 1), FSDP, WORK, FIRST))
    assert found.replicas == pytest.approx(2 * 2 * 1 / 2 * 4 * sum(parameter_split(V3)) / 4)


@pytest.mark.parametrize(("kind", "peak"), [("a100", 19.5e12), ("h100", 67e12), ("h200", 67e12)])
def test_fp32_is_real_fp32_as_torch_computes_it(kind: str, peak: float, capsys: pytest.CaptureFixture[str]):
    assert not torch.backends.cuda.matmul.allow_tf32  # or TF32 it would be, of 156 and 495 TFLOP/s
    assert main(["plan", "nano", "--gpus", "1", "--gpu", kind, "trainer.precision=32"]) == 0
    assert f"MFU, of {peak / 1e12:g}" in capsys.readouterr().out


@pytest.mark.parametrize("devices", ["1", "4", "[0, 1, 2]"])  # of the config: what runs here, not what is planned
def test_the_mesh_is_judged_by_gpus_alone(devices: str, capsys: pytest.CaptureFixture[str]):
    def planned(shard: int) -> int:
        words = ["data.batch_size=240", f"trainer.devices={devices}", f"strategy={{kind: fsdp2, dp_shard: {shard}}}"]
        return main(["plan", "nano", "--gpus", "10", "trainer.accumulate_grad_batches=20", *words])

    assert planned(5) == 0
    assert "dp_replicate 2 x dp_shard 5" in capsys.readouterr().out
    assert planned(3) == 2
    message = "strategy.dp_shard=3: with dp_replicate=3 it makes 9 processes, there are 10; use 2 or 5"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("devices", ["auto", "-1"])
def test_unknown_devices_are_the_planned_gpus(devices: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "nano", "--gpus", "8", "data.batch_size=16", f"trainer.devices={devices}"]) == 0
    length = compose(["nano"]).tree["data"]["sequence_length"]
    assert f"activations of {2 * length:,} tokens" in capsys.readouterr().out  # two samples per rank


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "2048"], "data.batch_size=15360: does not divide into micro-batches of 5 samples on 2048 ranks; "
                             "use data.batch_size=16384 trainer.accumulate_grad_batches=4096"),
        (["--gpus", "8", "--gpu", "h9"], "--gpu h9: not known; must be a100, h100, h200, h800"),
        (["--gpus", "8", "--gpu", "b200"], "--gpu b200: its rates are not known, and its grouped products give experts "
                                           "without tokens a gradient (pytorch#172439); must be a100, h100, h200"),
        (["--gpus", "12", "strategy={kind: fsdp2_ep, dp_shard: 8}", "trainer.devices=8",
          "trainer.accumulate_grad_batches=384"],
         "strategy.dp_shard=8: with dp_replicate=1 it makes 8 processes, there are 12; use 6 or 12"),
        (["--gpus", "8", "strategy=deepspeed"], f"only {', '.join(KINDS)} can be planned for --gpus"),
        (["--gpus", "0"], "argument --gpus: '0' must be a whole number of at least 1"),
        (["--sources"], "--sources: needs the number of ranks; add --gpus N"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(words, message, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "v3", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_loss_holds_as_many_logits_as_are_planned():
    assert MAX_LOGITS == cpu.MAX_LOGITS


@pytest.mark.parametrize(
    "words",
    [
        ["v3", "--gpus", "2048", "--gpu", "h800"],
        ["v3", "--gpus", "2048", "data.batch_ramp=null"],
        ["nano", "--gpus", "6"],
        ["nano", "--gpus", "6", "trainer.devices=auto", "data.batch_size=20"],
        ["nano", "--gpus", "6", "trainer.devices=4", "trainer.accumulate_grad_batches=2"],
        ["laptop", "--gpus", "3", "data.batch_size=15", "trainer.accumulate_grad_batches=5"],
    ],
)
def test_the_settings_that_a_refused_plan_advises_are_accepted(words, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *words]) == 2
    advised = capsys.readouterr().err.strip().rsplit("; use ", 1)[1].split()
    assert all(word.split("=")[0].startswith(("data.batch", "trainer.accumulate")) for word in advised)
    assert main(["plan", *words, *advised]) == 0
