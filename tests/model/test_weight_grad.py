"""The backward pass in two parts: weight gradients that are computed later are those that autograd computes at once."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_lightning.model.experts import Experts
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.model.weight_grad import Linear, WeightQueue, grouped_linear

from .small import Batch, clear_batch, small_config, small_model, total_loss

CONFIG = small_config(num_nextn_predict_layers=2)
OFFSETS_E = torch.tensor([0, 3, 3, 8])


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float64, False)],
)
def test_a_linear_layer_is_torchs_to_the_bit(dtype, autocast):
    found = []
    for layer in (nn.Linear(16, 24, bias=False), Linear(16, 24)):
        x, weight = leaves((2, 5, 16), (24, 16), dtype=dtype)
        layer.weight = nn.Parameter(weight.detach())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.double().square().sum().backward()
        found.append((y, x.grad, layer.weight.grad))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_experts_product_is_torchs_to_the_bit(dtype):
    found = []
    for product in (lambda x, w, o: F.grouped_mm(x, w.to(x.dtype), offs=o.int()), grouped_linear):
        (x,), (weight,) = leaves((8, 16), dtype=dtype), leaves((4, 16, 24))
        y = product(x, weight, OFFSETS_E)
        y.double().square().sum().backward()
        found.append((y, x.grad, weight.grad))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_wanted_gradients_are_computed(frozen):
    x, weight = leaves((8, 16), (4, 16, 24))
    layer = Linear(16, 24)
    (x if frozen == "x" else weight).requires_grad_(False)
    layer.weight.requires_grad_(frozen != "weight")
    for y in (layer(x), grouped_linear(x, weight, OFFSETS_E)):
        with Products() as products:
            y.square().sum().backward()
        assert products.runs.total() == 1


class Products(TorchDispatchMode):
    """Counts matrix products as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "_grouped_mm"):
            self.runs[name] += 1
        return func(*args, **(kwargs or {}))


def split_products(model: Transformer) -> Counter[str]:
    """The products with weights whose gradients can wait, by kind."""
    kinds = {Linear: "mm", Experts: "_grouped_mm"}
    runs: Counter[str] = Counter()
    for module in model.modules():
        if type(module) in kinds:
            runs[kinds[type(module)]] += 1 + isinstance(module, Experts)
    return runs


def loss_of(model: Transformer, batch: Batch, autocast: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return total_loss(model.losses(*batch), batch.targets)


def gradients_of(model: Transformer) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("autocast", [False, True])
def test_both_parts_together_are_the_backward_pass(policy, autocast):
    model = small_model(CONFIG, activation_checkpointing=policy)
    batch = clear_batch(model, padding=(0, 4))
    with Products() as whole:
        loss_of(model, batch, autocast).backward()
    expected = gradients_of(model)
    model.zero_grad()
    queue = WeightQueue()
    with Products() as first:
        loss = loss_of(model, batch, autocast)
        with queue.collect():
            loss.backward()
    early = gradients_of(model)
    waiting = {name for name, gradient in early.items() if gradient is None}
    assert {name for name in early if "proj" in name} == waiting
    with Products() as second:
        queue.run()
    assert second.runs == split_products(model)  # each weight once
    assert first.runs + second.runs == whole.runs  # nothing twice, recomputed or not
    for name, gradient in gradients_of(model).items():
        assert gradient.dtype == expected[name].dtype and torch.equal(gradient, expected[name]), name
    queue.run()  # nothing is left
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients_of(model).items())


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_passes_of_several_micro_batches_finish_in_any_order(policy):
    """As in a pipeline: forward passes ahead, one queue per micro-batch, one pass that is not split."""
    model = small_model(CONFIG, activation_checkpointing=policy)
    batches = [clear_batch(model, padding=(n, 0)) for n in range(4)]
    for batch in batches:
        loss_of(model, batch).backward()
    expected = gradients_of(model)
    model.zero_grad()
    queues = [WeightQueue() for _ in range(3)]
    losses = [loss_of(model, batch) for batch in batches]
    for i in (1, 0):
        with queues[i].collect():
            losses[i].backward()
    losses[3].backward()
    queues[0].run()
    with queues[2].collect():
        losses[2].backward()
    queues[2].run()
    queues[1].run()
    for name, gradient in gradients_of(model).items():
        assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_an_error_in_a_backward_pass_ends_collecting():
    with pytest.raises(ZeroDivisionError), WeightQueue().collect():
        raise ZeroDivisionError
    assert WeightQueue.collecting is None


def test_gradients_of_bf16_weights_add_up_in_fp32():
    """In bf16 most of 256 small gradients would be lost."""
    layer = Linear(16, 16).bfloat16()
    steps = [torch.randn(4, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(256)]
    exact = sum(x.double().t().sum(1).expand(16, 16) for x in steps)
    for x in steps:
        queue = WeightQueue()
        with queue.collect():
            layer(x).sum().backward()
        queue.run()
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    assert (layer.weight.grad - exact).norm() < 3e-3 * exact.norm()


def test_the_gradient_of_a_weight_that_is_computed_does_not_wait():
    """Of a cast or a shared part of another parameter: autograd has more to do."""
    whole = leaves((2, 4, 16, 24))[0]
    queue = WeightQueue()
    with queue.collect():
        grouped_linear(torch.ones(8, 16), whole[1], OFFSETS_E).square().sum().backward()
    assert not queue.waiting and whole.grad[1].abs().sum() > 0
