"""The test of a node before a run: what each kind of fault is told as."""

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.runs import node_check


def test_a_good_node_has_no_faults(capsys):
    assert main(["doctor", "--node", "2"]) == 0
    assert "2 devices passed" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["wrong_product", "wrong_sum"])
def test_a_device_that_computes_wrongly_says_what_was_wrong(tmp_path, monkeypatch, where):
    monkeypatch.setattr(node_check, where, lambda *arguments: "3 of 9 numbers are wrong")
    with pytest.raises(SystemExit):
        node_check.check_device(0, 1, str(tmp_path))
    assert node_check.verdict(0, 1, tmp_path) == "device 0: 3 of 9 numbers are wrong"


def test_what_a_device_raises_is_told_in_one_line(tmp_path, monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error:\nuncorrectable ECC error encountered")

    monkeypatch.setattr(node_check, "wrong_product", fail)
    with pytest.raises(SystemExit):
        node_check.check_device(0, 1, str(tmp_path))
    torch.distributed.destroy_process_group()
    line = "device 4: RuntimeError: CUDA error: uncorrectable ECC error encountered"
    (tmp_path / "0.txt").rename(tmp_path / "4.txt")
    assert node_check.verdict(4, 1, tmp_path) == line


def test_a_product_with_one_wrong_number_is_noticed(monkeypatch):
    assert node_check.wrong_product(torch.device("cpu")) is None
    product = torch.Tensor.__matmul__

    def wrong(a, b):
        found = product(a, b)
        if a.dtype == torch.bfloat16:
            found[3, 4] += 1
        return found

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert node_check.wrong_product(torch.device("cpu")) == "1 of 262144 numbers of a matrix product are wrong"


def test_a_process_that_hangs_or_dies_is_a_fault(tmp_path):
    assert node_check.verdict(1, None, tmp_path) == "device 1: not done in time"
    assert node_check.verdict(1, -11, tmp_path) == "device 1: ended with exit code -11"
    assert node_check.verdict(1, 0, tmp_path) is None
