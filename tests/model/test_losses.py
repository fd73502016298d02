"""Fused cross-entropy against torch's own in fp64."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_lightning.model.cpu import LossChunks, loss_chunks
from dsv3_lightning.model.fused_loss import add_product
from dsv3_lightning.model.losses import IGNORE, LinearCrossEntropy, linear_cross_entropy

V, D = 37, 12


def hidden_states(N: int, ignored: tuple[int, ...] = (), dtype: torch.dtype = torch.float64):
    """x [N, D], weight [V, D], targets [N]; logits of several units, so that no two tokens lose alike."""
    generator = torch.Generator().manual_seed(N)
    x_ND = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets_N = torch.randint(V, (N,), generator=generator)
    targets_N[list(ignored)] = IGNORE
    return x_ND, weight_VD, targets_N


def reference_cross_entropy(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and both gradients of the sum, fp64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x_ND, weight_VD))
    loss = F.cross_entropy(x @ weight.T, targets_N, ignore_index=IGNORE, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


@pytest.mark.parametrize(
    "chunks", [(1, 1), (4, 4), (10, 10), (11, 11), (2048, 2048), (6, 4), (10, 3), (2048, 1)]
)  # divides N or not, N itself, more than N; softmax in parts
@pytest.mark.parametrize("ignored", [(), (0, 3, 4, 5, 6, 7, 9)])  # with chunk 4, the second chunk is all ignored
def test_cross_entropy_and_gradients_equal_torch_in_fp64(ignored, chunks):
    x_ND, weight_VD, targets_N = hidden_states(10, ignored)
    expected, grad_x, grad_weight = reference_cross_entropy(x_ND, weight_VD, targets_N)
    loss = LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, *chunks)
    (0.3 * loss).backward()  # not 1: the gradients made in the forward pass must be scaled
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(x_ND.grad, 0.3 * grad_x, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(weight_VD.grad, 0.3 * grad_weight, rtol=1e-10, atol=1e-13)
    assert x_ND.grad[list(ignored)].abs().sum() == 0


def test_cross_entropy_of_ignored_targets_is_zero_with_zero_gradients():
    for N in (6, 0):  # and of no targets at all
        x_ND, weight_VD, targets_N = hidden_states(N, tuple(range(N)))
        loss = linear_cross_entropy(x_ND, weight_VD, targets_N)
        loss.backward()
        assert loss == 0
        assert torch.equal(x_ND.grad, torch.zeros(N, D, dtype=torch.float64))
        assert torch.equal(weight_VD.grad, torch.zeros(V, D, dtype=torch.float64))


def test_cross_entropy_survives_logits_that_overflow_an_exponential():
    x_ND, weight_VD, targets_N = hidden_states(10, dtype=torch.float32)
    with torch.no_grad():
        x_ND *= 100  # logits of 1,000: exp is inf in fp32 and in fp64
    expected, grad_x, grad_weight = reference_cross_entropy(x_ND, weight_VD, targets_N)
    loss = linear_cross_entropy(x_ND, weight_VD, targets_N)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(x_ND.grad.double(), grad_x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weight_VD.grad.double(), grad_weight, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_cross_entropy_gives_only_the_gradient_that_is_asked_for(frozen):
    x_ND, weight_VD, targets_N = hidden_states(10)
    _, grad_x, grad_weight = reference_cross_entropy(x_ND, weight_VD, targets_N)
    still, moving, expected = (x_ND, weight_VD, grad_weight) if frozen == "x" else (weight_VD, x_ND, grad_x)
    still.requires_grad_(False)
    linear_cross_entropy(x_ND, weight_VD, targets_N).backward()
    assert still.grad is None
    torch.testing.assert_close(moving.grad, expected)


def test_two_heads_on_one_weight_add_their_gradients():  # main head and MTP module
    x_ND, weight_VD, targets_N = hidden_states(10)
    shifted_N = targets_N.roll(1)
    _, _, first = reference_cross_entropy(x_ND, weight_VD, targets_N)
    _, _, second = reference_cross_entropy(x_ND, weight_VD, shifted_N)
    loss = linear_cross_entropy(x_ND, weight_VD, targets_N) + 0.3 * linear_cross_entropy(x_ND, weight_VD, shifted_N)
    loss.backward()
    torch.testing.assert_close(weight_VD.grad, first + 0.3 * second)


@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy_of_bf16_inputs_is_summed_in_fp32(autocast):
    # 3,000 tokens lose about 20,000: a bf16 sum stalls where its spacing (64 or 128) swallows a token's loss.
    N = 3000
    x_ND, weight_VD, targets_N = hidden_states(N, tuple(range(0, N, 7)), torch.bfloat16)
    expected, grad_x, grad_weight = reference_cross_entropy(x_ND, weight_VD, targets_N)
    if autocast:  # fp32 weights and inputs with the same values: cast to bf16 for the products
        x_ND, weight_VD = (t.detach().float().requires_grad_() for t in (x_ND, weight_VD))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if autocast:
            loss = linear_cross_entropy(x_ND, weight_VD, targets_N)
        else:
            loss = LinearCrossEntropy.apply(
                x_ND, weight_VD, targets_N, 256, 256
            )  # gradients add up over chunks in fp32
    loss.backward()
    assert loss.dtype == torch.float32
    assert (x_ND.grad.dtype, weight_VD.grad.dtype) == (x_ND.dtype, weight_VD.dtype)
    assert abs(loss.item() / expected.item() - 1) < 1e-3
    for got, exact in ((x_ND.grad, grad_x), (weight_VD.grad, grad_weight)):
        assert (got.double() - exact).norm() < 0.01 * exact.norm()  # bf16 rounds to 2^-9 = 0.002


@pytest.mark.parametrize("factor", [1 / 3, 0.3 / 67_000_001])
def test_gradients_of_bf16_are_scaled_by_a_factor_that_is_not_rounded(factor):
    """In bf16 1/3 is 0.2 % larger, so the trunk would learn at another rate than the head."""
    x_ND, weight_VD, targets_N = hidden_states(2000, dtype=torch.bfloat16)
    _, *exact = reference_cross_entropy(x_ND, weight_VD, targets_N)
    (factor * linear_cross_entropy(x_ND, weight_VD, targets_N)).backward()
    for tensor, expected in zip((x_ND, weight_VD), exact, strict=True):
        got = tensor.grad.double()
        assert abs((got * expected).sum() / (expected * expected).sum() / factor - 1) < 3e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_is_computed_where_none_is_wanted(dtype):
    """Validation: the head's weight is a parameter, which needs a gradient as far as autograd's functions can see."""
    x_ND, weight_VD, targets_N = hidden_states(30, dtype=dtype)
    with torch.no_grad(), CountedProducts() as validation:
        loss = linear_cross_entropy(x_ND.detach(), weight_VD, targets_N, LossChunks(10, 5))
    with CountedProducts() as training:
        with_gradients = linear_cross_entropy(x_ND, weight_VD, targets_N, LossChunks(10, 5))
    assert (validation.products, training.products) == (3, 9)
    assert torch.equal(loss, with_gradients)


class CountedProducts(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "vocab_size", "chunks"),
    [
        ("cuda", 129280, (4096, 1038)),  # V3: 4,096 tokens of a product, 2^27 logits in fp32
        ("cuda", 4096, (32768, 32768)),
        ("cpu", 4096, (256, 256)),
        ("cpu", 2**21, (1, 1)),
    ],
)
def test_products_of_the_loss_are_large_on_gpus(device, vocab_size, chunks):
    assert loss_chunks(device, vocab_size) == chunks


def test_a_product_that_adds_by_itself_gives_the_same_gradient():
    """On CUDA one operation multiplies bf16 and adds in fp32; a stand-in with its interface takes its place here."""

    def stand_in(total, a, b, *, out_dtype, out):
        assert out is total and out_dtype == total.dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
        out.copy_(total + a.to(out_dtype) @ b.to(out_dtype))

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 300), (300, 4)))
    total = torch.randn(5, 4, generator=generator)
    expected = total.double() + a.double() @ b.double()
    with mock.patch.object(torch, "addmm", stand_in):
        add_product(total, a, b, None)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_logits_of_the_whole_batch_are_never_held():
    generator = torch.Generator().manual_seed(0)
    x_ND, weight_VD = torch.randn(1100, 8, generator=generator), torch.randn(4000, 8, generator=generator)
    targets_N = torch.randint(4000, (1100,), generator=generator)
    expected, grad_x, grad_weight = reference_cross_entropy(x_ND, weight_VD, targets_N)
    x_ND.requires_grad_(), weight_VD.requires_grad_()
    with LargestTensor() as largest:
        loss = linear_cross_entropy(x_ND, weight_VD, targets_N)
        loss.backward()
    assert 8 * 4000 < largest.numel <= 2**20  # of 4.4 M logits
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x_ND.grad.double(), grad_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight_VD.grad.double(), grad_weight, rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("target", [-1, -99, -101, V])
def test_a_target_that_is_no_token_is_refused(target):
    """Taking a stray -1 for token 0 would train the model to write it."""
    x_ND, weight_VD, targets_N = hidden_states(4)
    targets_N[2] = target
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        linear_cross_entropy(x_ND, weight_VD, targets_N)
