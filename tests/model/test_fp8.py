"""FP8 products against loops over tiles in fp64, and which products of a model are in FP8."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_lightning.model import fp8
from dsv3_lightning.model.fp8 import BLOCK, COLUMN, TILE, Form, emulated_product, round_to, round_tokens, use_fp8
from dsv3_lightning.model.weight_grad import Linear, WeightQueue

from .small import clear_batch, small_config, small_model, total_loss

CONFIG = small_config(num_nextn_predict_layers=1)
CODES = torch.arange(256, dtype=torch.int64)
CODES = CODES[CODES % 128 < 127]  # without the two that are no numbers
E4M3 = CODES.to(torch.uint8).view(torch.float8_e4m3fn).double()


def outlying(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of many sizes, so that tiles, blocks and one scale for all differ by much."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.logspace(-2, 3, shape[-1])[torch.randperm(shape[-1], generator=generator)]


def nearest(x: Tensor) -> Tensor:
    """The E4M3 number next to each number, in fp64; of two as near the one with the even mantissa."""
    distance = (x.double()[..., None] - E4M3).abs()
    ties = distance == distance.amin(-1, keepdim=True)
    return E4M3[(ties * (2 - CODES % 2)).argmax(-1)]


def by_tiles(x: Tensor, tile: tuple[int, int], power_of_two: bool = False, starts: tuple[int, ...] = (0,)) -> Tensor:
    """What x becomes, fp64, tile by tile. starts: rows where a tile has to begin."""
    if x.dim() == 3:
        return torch.stack([by_tiles(matrix, tile, power_of_two) for matrix in x])
    out = torch.empty_like(x, dtype=torch.float64)
    for first, end in pairwise([*starts, len(x)]):
        for i in range(first, end, tile[0]):
            for j in range(0, x.shape[1], tile[1]):
                rows, columns = slice(i, min(i + tile[0], end)), slice(j, j + tile[1])
                scale = x[rows, columns].abs().max().double() / 448
                scale = 2 ** scale.log2().ceil() if power_of_two else scale.float().double()
                out[rows, columns] = nearest(x[rows, columns] / scale) * scale if scale else 0
    return out


def close(a: Tensor, b: Tensor, within: float) -> bool:
    return bool((a.double() - b.double()).norm() <= within * b.double().norm())


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", [TILE, COLUMN, BLOCK])
@pytest.mark.parametrize("shape", [(3, 256), (130, 96), (257, 5), (2, 48, 130)])
def test_numbers_are_rounded_tile_by_tile(shape, tile, power_of_two):
    x = outlying(*shape)
    rounded = round_to(tile, x, power_of_two)
    assert rounded.numbers.dtype == torch.float8_e4m3fn and rounded.scales.dtype == torch.float32
    assert rounded.scales.shape == (*shape[:-2], *(-(-size // side) for size, side in zip(shape[-2:], tile)))
    expected = by_tiles(x, tile, power_of_two)
    # where a quotient lies between two numbers, its rounding to fp32 may choose the other one
    assert (rounded.wide().double() - expected).abs().gt(1e-6 * expected.abs()).float().mean() < 1e-4
    assert close(rounded.wide(), expected, 1e-3)
    if power_of_two:
        assert (rounded.scales.log2() % 1 == 0).all()


def test_a_power_of_two_is_the_next_one_above():
    largest = torch.tensor([448.0, 448.1, 449.0, 447.0, 1.0, 896.0])
    assert fp8.scales_for(largest, True).tolist() == [1.0, 2.0, 2.0, 1.0, 2.0**-8, 2.0]


def test_zeros_stay_zeros_and_small_numbers_stay_finite():
    for x in (torch.zeros(2, 200), torch.full((2, 200), 1e-38), torch.full((2, 200), 1e-45)):
        for power_of_two in (False, True):
            wide = round_to(TILE, x, power_of_two).wide()
            assert wide.isfinite().all() and (wide - x).abs().max() <= 1e-38


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_so_in_its_tile_alone(bad, power_of_two):
    """The step is then skipped, as without FP8."""
    x = outlying(4, 256)
    x[1, 3] = bad
    finite = round_to(TILE, x, power_of_two).wide().isfinite()
    assert not finite[1, 3] and finite[[0, 2, 3]].all() and finite[1, 128:].all()
    offsets_E = torch.tensor([1, 4])
    finite = round_tokens(x, offsets_E, power_of_two).wide().isfinite()
    assert not finite[1, 3] and finite[0].all() and finite[:, 4:].all()


def test_tiles_of_tokens_end_with_their_expert():
    x, offsets_E = outlying(600, 40), torch.tensor([0, 200, 200, 201, 590])
    expected = by_tiles(x, COLUMN, starts=(0, 200, 201, 590))
    assert close(round_tokens(x, offsets_E).wide(), expected, 1e-3)
    assert not close(round_to(COLUMN, x).wide(), expected, 1e-3)
    one = torch.tensor([600])  # a single expert: as a matrix
    assert torch.equal(round_tokens(x, one).wide(), round_to(COLUMN, x).wide())


@pytest.mark.parametrize("powers", [(False, False), (True, False), (False, True)])
def test_a_linear_layer_and_both_gradients_are_those_of_rounded_operands(powers):
    x, weight, grad = outlying(150, 160).requires_grad_(), outlying(144, 160, seed=1), outlying(150, 144, seed=2)
    layer = Linear(160, 144)
    layer.weight.data = weight
    form = Form(emulated_product, *powers)
    y = fp8.linear(form, x.view(3, 50, 160), layer.weight, torch.float32)
    y.backward(grad.view(3, 50, 144))
    x_tiles, blocks = by_tiles(x.detach(), TILE, powers[0]), by_tiles(weight, BLOCK)
    assert close(y.view(150, 144), x_tiles @ blocks.T, 1e-3)
    assert close(x.grad, by_tiles(grad, TILE, powers[1]) @ blocks, 1e-3)
    rows = by_tiles(x_tiles.float(), COLUMN, powers[0])
    assert close(layer.weight.grad, by_tiles(grad, COLUMN, powers[1]).T @ rows, 1e-3)
    assert not close(layer.weight.grad, grad.double().T @ x.detach().double(), 1e-3)


@pytest.mark.parametrize("powers", [(True, False), (False, True)])
def test_the_experts_product_and_both_gradients_are_those_of_rounded_operands(powers):
    x, weight, grad = outlying(300, 144).requires_grad_(), outlying(3, 144, 136, seed=1), outlying(300, 136, seed=2)
    weight.requires_grad_()
    offsets_E = torch.tensor([140, 140, 300])
    y = fp8.grouped_linear(Form(emulated_product, *powers), x, weight, offsets_E)
    queue = WeightQueue()
    with queue.collect():
        y.backward(grad)
    assert weight.grad is None
    queue.run()
    x_tiles, blocks = by_tiles(x.detach(), TILE, powers[0]), by_tiles(weight.detach(), BLOCK)
    grad_tiles = by_tiles(grad, TILE, powers[1])
    rows, columns = (by_tiles(part, COLUMN, power, (0, 140)) for part, power in zip((x_tiles.float(), grad), powers))
    for e, (first, end) in enumerate(pairwise([0, 140, 140, 300])):
        own = slice(first, end)
        assert close(y[own], x_tiles[own] @ blocks[e], 1e-3)
        assert close(x.grad[own], grad_tiles[own] @ blocks[e].T, 1e-3)
        assert close(weight.grad[e], rows[own].T @ columns[own], 1e-3)


class Casts(TorchDispatchMode):
    """Counts casts to FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.casts += (kwargs or {}).get("dtype") == torch.float8_e4m3fn
        return func(*args, **(kwargs or {}))


def test_exactly_the_products_of_blocks_are_in_fp8():
    """Not those of the embedding, the heads, routers, norms, attention itself, and MTP's joining of inputs."""
    model = small_model(CONFIG)
    use_fp8(model, emulated_product)
    batch = clear_batch(model)
    in_blocks = {name for name, module in model.named_modules() if isinstance(module, Linear)} - {"mtp.0.eh_proj"}
    in_fp8 = {name for name, module in model.named_modules() if isinstance(module, Linear) and called(module, batch)}
    assert in_fp8 == in_blocks and len(in_blocks) == 4 * 5 + 4 * 3
    products = len(in_blocks) + 3 * 2
    with Casts() as forward:
        loss = total_loss(model.losses(*batch), batch.targets)
    assert forward.casts == 2 * products
    with Casts() as backward:
        loss.backward()
    assert backward.casts == 3 * products


def called(layer: Linear, batch) -> bool:
    with Casts() as mode:
        layer(torch.ones(2, layer.in_features))
    return mode.casts == 2


def test_powers_of_two_are_where_the_report_has_them():
    model = small_model(CONFIG)
    use_fp8(model, emulated_product)
    found = {}
    for name, module in model.named_modules():
        for product in ("product", "gate_up_product", "down_product"):
            if hasattr(module, product) and hasattr(getattr(module, product), "args"):
                form = getattr(module, product).args[0]
                found[f"{name}.{product}"] = (form.input, form.gradient)
    assert {name for name, (x, _) in found.items() if x} == {
        name for name in found if "o_proj" in name or "gate_up" in name
    }
    assert {name for name, (_, grad) in found.items() if grad} == {name for name in found if "down_product" in name}


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_checkpointing_and_late_gradients_change_nothing(policy, autocast):
    found = []
    for checkpointing, late in (("none", False), (policy, False), (policy, True)):
        model = small_model(CONFIG, activation_checkpointing=checkpointing)
        use_fp8(model, emulated_product)
        batch = clear_batch(model, padding=(0, 4))
        queue = WeightQueue()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = total_loss(model.losses(*batch), batch.targets)
        if late:
            with queue.collect():
                loss.backward()
        else:
            loss.backward()
        queue.run()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in found[0].items():
        assert all(torch.equal(gradients[name], expected) for gradients in found[1:]), name
