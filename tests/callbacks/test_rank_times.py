"""The slowest rank is found though every rank's step takes as long as the slowest one's, and it is named."""

import pytest
import torch

from dsv3_lightning.callbacks import throughput
from dsv3_lightning.callbacks.rank_times import OwnWork, RankTimes, max_over_mean, step_seconds, straggler
from dsv3_lightning.callbacks.throughput import Throughput, Window, data_sheet_peak
from dsv3_lightning.planning.hardware import CUDA_NAMES, GPUS, gpu_of_device
from tests.model.small import small_batch, small_config, small_model

TYPICAL = RankTimes(
    seconds=2.0, waited=0.0, host=0.0, compute=0.4, allocated=1.0, reserved=2.0, retries=0.0, slots=100.0
)


def test_a_rank_that_computes_slowly_holds_up_all_and_only_it_is_slow():
    """Wall time is 2 s on each; rank 2 computes half as fast, so that the others would need 1 s."""
    ranks = [TYPICAL, TYPICAL, TYPICAL._replace(compute=0.8), TYPICAL]
    assert step_seconds(ranks, micro_batches=3) == pytest.approx([3.0, 3.0, 6.0, 3.0])
    assert straggler(step_seconds(ranks, 3), 1.5) == 2


@pytest.mark.parametrize("cause", ["waited", "host"])
def test_a_rank_that_waits_for_data_or_callbacks_is_slow_by_that_time(cause):
    ranks = [TYPICAL, TYPICAL._replace(**{cause: 1.5})]
    assert step_seconds(ranks, 1) == pytest.approx([0.5, 2.0])
    assert straggler(step_seconds(ranks, 1), 1.5) == 1


def test_ranks_without_measured_modules_are_compared_by_their_waits():
    ranks = [TYPICAL._replace(compute=0.0), TYPICAL._replace(compute=0.0, waited=1.0)]
    assert step_seconds(ranks, 1) == pytest.approx([1.0, 2.0])


def test_a_single_rank_takes_the_time_of_the_step_and_is_no_straggler():
    assert step_seconds([TYPICAL], 4) == [8.0] and straggler([8.0], 1.5) is None


def test_own_work_counts_routed_tokens_and_takes_its_hooks_away():
    model = small_model(small_config())
    batch = small_batch(model.config)
    own = OwnWork(model, torch.device("cpu"))
    model.losses(*batch)
    seconds = own.close()
    layers, tokens, chosen = 2, 2 * 12, 3  # of three layers the first is dense
    assert own.slots == layers * tokens * chosen
    assert seconds > 0
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())


def test_load_is_relative_to_the_mean_rank():
    assert max_over_mean([30.0, 10.0, 20.0]) == 1.5 and max_over_mean([0.0, 0.0]) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),  # as drivers before 470 say
        ("NVIDIA H800", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),  # 756 TFLOP/s
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_that_of_the_data_sheet_for_names_that_cuda_gives(monkeypatch, name, peak):
    assert set(CUDA_NAMES.values()) == set(GPUS)
    gpu = gpu_of_device(name)
    assert (gpu and gpu.peak) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert data_sheet_peak(torch.device("cuda", 0), torch.bfloat16) == peak
    assert data_sheet_peak(torch.device("cpu"), torch.bfloat16) is None


def test_on_a_known_gpu_there_are_two_shares_and_else_that_of_the_measured_peak():
    window = Window()
    window.add(1000, 2.0, 0.0)
    callback = Throughput()
    callback.flops_per_token, callback.peak_flops, callback.measured_peak = 4e9, 1e13, 8e12
    rates = callback.rates(window, world_size=2)
    assert (rates["mfu"], rates["mfu_of_measured_peak"]) == pytest.approx((0.1, 0.125))
    callback.peak_flops = 8e12
    rates = callback.rates(window, world_size=2)
    assert (rates["mfu"], rates["mfu_of_measured_peak"]) == (pytest.approx(0.125), None)


def test_a_host_name_survives_the_exchange():
    name = "knoten-ä" + "x" * 80
    shown = throughput.name_from(throughput.name_bytes(name))
    assert name.startswith(shown) and len(shown.encode()) == throughput.NAME_BYTES
