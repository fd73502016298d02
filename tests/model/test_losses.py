"""Fused cross-entropy against torch's own in fp64, the sequence-wise balance loss against loops over V3 eq. 17-20."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_lightning.model.losses import IGNORE, LinearCrossEntropy, linear_cross_entropy, sequence_balance_loss

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


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 2048])  # divides N or not, N itself, more than N
@pytest.mark.parametrize("ignored", [(), (0, 3, 4, 5, 6, 7, 9)])  # with chunk 4, the second chunk is all ignored
def test_cross_entropy_and_gradients_equal_torch_in_fp64(ignored, chunk):
    x_ND, weight_VD, targets_N = hidden_states(10, ignored)
    expected, grad_x, grad_weight = reference_cross_entropy(x_ND, weight_VD, targets_N)
    loss = LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, chunk)
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
            loss = LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, 256)  # gradients add up over chunks in fp32
    loss.backward()
    assert loss.dtype == torch.float32
    assert (x_ND.grad.dtype, weight_VD.grad.dtype) == (x_ND.dtype, weight_VD.dtype)
    assert abs(loss.item() / expected.item() - 1) < 1e-3
    for got, exact in ((x_ND.grad, grad_x), (weight_VD.grad, grad_weight)):
        assert (got.double() - exact).norm() < 0.01 * exact.norm()  # bf16 rounds to 2^-9 = 0.002


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


def reference_balance(scores_BTE: Tensor, experts_BTK: Tensor, lengths: list[int]) -> Tensor:
    """Eq. 17-20, one sum after another, without α; differentiable in the fp64 scores."""
    B, _, E = scores_BTE.shape
    K = experts_BTK.shape[-1]
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        T = lengths[b]
        for i in range(E):
            f_i = E / (K * T) * sum(i in experts_BTK[b, t].tolist() for t in range(T))  # eq. 18: a number
            P_i = sum(scores_BTE[b, t, i] / sum(scores_BTE[b, t, j] for j in range(E)) for t in range(T)) / T  # 19, 20
            total = total + f_i * P_i
    return total / B


def random_choices(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, T, E], choices [B, T, K] that are not the K largest scores, and the mask [B, T]; E = 6, K = 2."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    skew = torch.arange(6) / 4
    scores_BTE = torch.rand(B, T, 6, generator=generator, dtype=torch.float64) * (0.2 + skew)
    experts_BTK = (torch.rand(B, T, 6, generator=generator, dtype=torch.float64) + skew).topk(2).indices
    mask_BT = torch.arange(T) < torch.tensor(lengths)[:, None]
    return scores_BTE.requires_grad_(), experts_BTK, mask_BT


@pytest.mark.parametrize("lengths", [[5, 5, 5], [7, 1, 4]])
def test_balance_loss_and_gradient_equal_the_equations(lengths):
    # Not so with: unnormalized affinities, f from the K largest scores, f or P over the whole batch, padding in T.
    scores_BTE, experts_BTK, mask_BT = random_choices(lengths)
    expected = reference_balance(scores_BTE, experts_BTK, lengths)
    (expected_grad,) = torch.autograd.grad(expected, scores_BTE)
    loss = sequence_balance_loss(scores_BTE, experts_BTK, mask_BT)
    (grad,) = torch.autograd.grad(loss, scores_BTE)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)  # f carries none: it is a number there
    assert grad.abs().max() > 1e-3

    fp32 = sequence_balance_loss(scores_BTE.detach().float(), experts_BTK, mask_BT)
    assert fp32.dtype == torch.float32
    assert fp32.item() == pytest.approx(expected.item(), rel=1e-6)


def test_balance_loss_is_one_in_perfect_balance_and_e_over_k_when_collapsed():
    scores_BTE, mask_BT = torch.full((2, 6, 6), 0.4), torch.ones(2, 6, dtype=torch.bool)
    in_turn_BTK = torch.tensor([[0, 1], [2, 3], [4, 5]] * 2).expand(2, -1, -1)
    assert sequence_balance_loss(scores_BTE, in_turn_BTK, mask_BT).item() == pytest.approx(1, rel=1e-6)

    scores_BTE = torch.tensor([0.8, 0.8, 0, 0, 0, 0]).expand(2, 6, 6)
    collapsed_BTK = torch.tensor([0, 1]).expand(2, 6, 2)
    # f = 6 / (2 · 6) · 6 = 3 for two experts, P = 1/2 for each
    assert sequence_balance_loss(scores_BTE, collapsed_BTK, mask_BT).item() == pytest.approx(3, rel=1e-6)


def test_balance_loss_pushes_affinities_of_overloaded_experts_down():
    scores_BTE = torch.full((1, 4, 4), 0.5, requires_grad=True)
    experts_BTK = torch.tensor([[[0], [0], [0], [1]]])
    sequence_balance_loss(scores_BTE, experts_BTK, torch.ones(1, 4, dtype=torch.bool)).backward()
    grad_E = scores_BTE.grad[0, 0]
    assert grad_E[0] > grad_E[1].abs() and grad_E[2] < 0 and grad_E[3] < 0


def test_balance_loss_of_a_batch_is_the_mean_of_its_sequences():
    # Over the whole batch (V3 §4.5.3) it would be another number: these sequences prefer opposite experts.
    scores_BTE, experts_BTK, mask_BT = random_choices([6, 6, 6, 6])
    odd = torch.tensor([False, True, False, True])[:, None, None]
    scores_BTE, experts_BTK = scores_BTE.where(~odd, scores_BTE.flip(-1)), experts_BTK.where(~odd, 5 - experts_BTK)
    whole = sequence_balance_loss(scores_BTE, experts_BTK, mask_BT)
    for size in (1, 2):
        parts = [
            sequence_balance_loss(scores_BTE[b : b + size], experts_BTK[b : b + size], mask_BT[b : b + size])
            for b in range(0, 4, size)
        ]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)
    one = sequence_balance_loss(scores_BTE.reshape(1, 24, 6), experts_BTK.reshape(1, 24, 2), mask_BT.reshape(1, 24))
    assert abs(one - whole) > 0.01


def test_balance_loss_of_a_padded_sequence_is_that_of_the_shorter_one():
    scores_BTE, experts_BTK, mask_BT = random_choices([4, 9])
    padded = sequence_balance_loss(scores_BTE, experts_BTK, mask_BT)
    short = sequence_balance_loss(scores_BTE[:1, :4], experts_BTK[:1, :4], mask_BT[:1, :4])
    long = sequence_balance_loss(scores_BTE[1:], experts_BTK[1:], mask_BT[1:])
    torch.testing.assert_close(padded, (short + long) / 2)
    (grad,) = torch.autograd.grad(padded, scores_BTE)
    assert grad[0, 4:].abs().sum() == 0


def test_balance_loss_of_nothing_but_padding_is_finite():
    scores_BTE, experts_BTK, mask_BT = random_choices([5, 5])
    loss = sequence_balance_loss(scores_BTE, experts_BTK, torch.zeros_like(mask_BT))
    (grad,) = torch.autograd.grad(loss, scores_BTE)
    assert loss == 0 and grad.abs().sum() == 0


def test_balance_loss_is_fp32_under_autocast():
    scores_BTE, experts_BTK, mask_BT = random_choices([50, 50])
    scores_BTE = scores_BTE.detach().float()
    plain = sequence_balance_loss(scores_BTE, experts_BTK, mask_BT)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sequence_balance_loss(scores_BTE, experts_BTK, mask_BT)
    assert torch.equal(plain, mixed) and math.isfinite(plain)
