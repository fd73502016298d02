"""The grouped experts against a plain loop, however uneven the load: no capacity, nothing dropped, nothing invented."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.dispatch import LocalDispatcher
from dsv3_lightning.model.experts import Experts, grouped_linear
from dsv3_lightning.model.moe import MoE
from dsv3_lightning.model.permute import sum_of_rows

from .small import routers, small_batch, small_config, small_model

D, E, K, N = 32, 8, 3, 50


def expert_loop(x_ND, experts_NK, gates_NK, gate_up, down) -> Tensor:
    """V3 eq. 12, the routed part, token by token in fp64; differentiable."""
    rows = []
    for n in range(len(x_ND)):
        row = 0 * (x_ND[n] + gates_NK[n].sum())  # padding, too, has a gradient, which is 0
        for k in range(experts_NK.shape[1]):
            e = experts_NK[n, k]
            if e < 0:
                continue
            gate, up = (x_ND[n] @ gate_up[e]).split(gate_up.shape[2] // 2)
            row = row + gates_NK[n, k] * ((F.silu(gate) * up) @ down[e])
        rows.append(row)
    return torch.stack(rows)


def routed(module: Experts, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor) -> Tensor:
    """What MoE.forward does between the router and the shared experts."""
    dispatcher = LocalDispatcher(module.num_experts)
    sent = dispatcher.dispatch(x_ND, experts_NK, gates_NK)
    return dispatcher.combine(dispatcher.send_back(module(*dispatcher.receive(sent)), sent))


def same_for_all(*experts: int) -> Tensor:
    return torch.tensor(experts).expand(N, -1)


def random_experts(chosen: int) -> Tensor:
    return torch.rand(N, E, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :chosen]


LOADS = {
    "all tokens on the first experts": same_for_all(0, 1, 2),
    "all tokens on the last experts": same_for_all(5, 6, 7),
    "empty experts before, between and after": same_for_all(1, 4, 6),
    "one expert each, all on one": same_for_all(3),
    "all but one token on the same experts": torch.cat((same_for_all(2, 0, 5)[1:], torch.tensor([[7, 1, 3]]))),
    "every expert for every token": random_experts(E),
    "at random": random_experts(K),
    "a single token": torch.tensor([[6, 0, 4]]),
    "padding": random_experts(K).masked_fill(torch.arange(N)[:, None] % 3 == 1, -1),
    "nothing but padding": same_for_all(-1, -1, -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load", LOADS)
def test_outputs_and_gradients_equal_a_loop_over_experts(load, dtype):
    experts_NK = LOADS[load]
    tokens, chosen = experts_NK.shape
    generator = torch.Generator().manual_seed(0)
    module = Experts(small_config())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2, generator=generator)
    x_ND = torch.randn(tokens, D, generator=generator).requires_grad_()
    gates_NK = torch.rand(tokens, chosen, generator=generator).requires_grad_()  # not normalized, not sorted
    grad_ND = torch.randn(tokens, D, generator=generator)

    inputs = [x_ND, gates_NK, module.gate_up_proj, module.down_proj]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out_ND = routed(module, x_ND, experts_NK, gates_NK)
    assert out_ND.dtype == dtype
    out_ND = out_ND.float()
    gradients = torch.autograd.grad(out_ND, inputs, grad_ND)

    x, gates, gate_up, down = exact = [t.detach().double().requires_grad_() for t in inputs]
    expected_ND = expert_loop(x, experts_NK, gates, gate_up, down)
    exactness = 1e-6 if dtype == torch.float32 else 2e-2  # bf16 has 8 bits; each result went through three products
    wanted = (expected_ND, *torch.autograd.grad(expected_ND, exact, grad_ND.double(), materialize_grads=True))
    for got, want in zip((out_ND, *gradients), wanted, strict=True):
        assert (got - want).norm() <= exactness * want.norm()
    idle = [e for e in range(E) if e not in experts_NK]
    assert all(gradient[idle].abs().sum() == 0 for gradient in gradients[2:])


def test_the_first_half_of_gate_up_is_the_one_that_is_activated():
    module = Experts(small_config(hidden_size=8, moe_intermediate_size=8))
    with torch.no_grad():
        module.gate_up_proj.copy_(torch.cat((torch.eye(8), 2 * torch.eye(8)), 1).expand(E, -1, -1))
        module.down_proj.copy_(torch.eye(8).expand(E, -1, -1))
        x_ND = torch.tensor([[1.0, -1.0, 0.0, 3.0, 0.5, 2.0, -2.0, -3.0]])
        out = routed(module, x_ND, torch.tensor([[2]]), torch.tensor([[1.0]]))
    # silu(x) · 2x; the other way round silu(2x) · x is 0.88 · 2 / 1 for x = 1
    expected = [2 * x * x / (1 + torch.tensor(-x).exp().item()) for x in (1.0, -1.0, 0.0, 3.0, 0.5, 2.0, -2.0, -3.0)]
    assert out[0].tolist() == pytest.approx(expected)


def test_the_worst_skew_drops_nothing():
    # A bias of 100 sends every token to experts 4, 5 and 6, which lie in two of the four groups.
    moe = MoE(small_config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.2, generator=generator)
        moe.gate.expert_bias[4:7] = 100
    x_BTD = torch.randn(2, 40, D, generator=generator)
    out_BTD, stats = moe(x_BTD, torch.ones(2, 40, dtype=torch.bool))
    assert stats.counts_E.tolist() == [0, 0, 0, 0, 80, 80, 80, 0]
    out_BTD.square().sum().backward()
    for parameter in moe.experts.parameters():
        used_E = parameter.grad.abs().amax((1, 2)) > 0
        assert used_E.tolist() == [False] * 4 + [True] * 3 + [False]

    x_ND = x_BTD.flatten(0, 1).double()
    affinities_NK = (x_ND @ moe.gate.weight.double().T).sigmoid()[:, 4:7]
    gates_NK = 2.5 * affinities_NK / affinities_NK.sum(1, keepdim=True)
    experts_NK = torch.tensor([4, 5, 6]).expand(80, -1)
    routed_ND = expert_loop(x_ND, experts_NK, gates_NK, *(p.detach().double() for p in moe.experts.parameters()))
    gate, up, down = (p.detach().double().T for p in moe.shared_experts.parameters())
    shared_ND = (F.silu(x_ND @ gate) * (x_ND @ up)) @ down
    torch.testing.assert_close(out_BTD.flatten(0, 1).double(), routed_ND + shared_ND, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skewed", [False, True])
def test_counts_add_up_to_the_tokens_times_k(skewed):
    moe = MoE(small_config())
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        moe.gate.expert_bias[0] = 100.0 * skewed
    x_BTD = torch.randn(3, 17, D, generator=torch.Generator().manual_seed(1))
    mask_BT = torch.arange(17) < torch.tensor([[17], [4], [0]])
    counts_E = moe(x_BTD, mask_BT)[1].counts_E
    assert counts_E.sum() == (17 + 4) * K
    assert counts_E[0] == 21 or not skewed


class Counting(LocalDispatcher):
    """Nothing travels, and the routed tokens that go in and come out are counted."""

    def __init__(self, num_experts) -> None:
        super().__init__(num_experts)
        self.received, self.combined = [], []

    def receive(self, sent):
        x_RD, offsets_E, gates_R = super().receive(sent)
        self.received.append((len(x_RD), offsets_E.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()))
        return x_RD, offsets_E, gates_R

    def send_back(self, y_RD, sent):
        self.combined.append(int(y_RD.detach().abs().amax(1).gt(0).sum()))  # what comes back is not nothing
        return super().send_back(y_RD, sent)


@pytest.mark.parametrize("training", [True, False])
def test_every_layer_serves_every_token_when_all_want_one_expert(training):
    config = small_config(num_experts_per_tok=1, n_group=1, topk_group=1, num_nextn_predict_layers=1)
    model = small_model(config).train(training)
    for router in routers(model):
        router.expert_bias.zero_()[5] = 100.0
    counters = [Counting(8) for _ in range(config.num_moe_layers)]
    for module, counter in zip((m for m in model.modules() if isinstance(m, MoE)), counters, strict=True):
        module.dispatcher = counter
    batch = small_batch(config, B=3, T=40)
    losses = model.losses(*batch)
    all_on_one = [0] * 5 + [3 * 40] + [0] * 2
    assert losses.counts_LE.tolist() == [all_on_one] * 3  # two layers and the MTP module's
    for counter in counters:
        assert counter.received == [(3 * 40, all_on_one)] and counter.combined == [3 * 40]


def test_what_a_token_gets_does_not_depend_on_its_company():
    # With a capacity, a token behind many others for the same experts would get less.
    moe = MoE(small_config())
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    x_BTD = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(1))
    alone, _ = moe(x_BTD, torch.ones(1, 1, dtype=torch.bool))
    crowd, _ = moe(x_BTD.expand(1, 500, D), torch.ones(1, 500, dtype=torch.bool))
    torch.testing.assert_close(crowd, alone.expand_as(crowd), rtol=1e-5, atol=1e-6)


def test_the_grouped_product_of_empty_groups_is_the_loops():
    generator = torch.Generator().manual_seed(0)
    x_RD = torch.randn(10, 8, generator=generator, requires_grad=True)
    weight_EDF = torch.randn(5, 8, 12, generator=generator, requires_grad=True)
    offsets_E = torch.tensor([0, 4, 4, 10, 10])
    y_RF = grouped_linear(x_RD, weight_EDF, offsets_E)
    expected = torch.cat((x_RD[:4] @ weight_EDF[1], x_RD[4:] @ weight_EDF[3]))
    torch.testing.assert_close(y_RF, expected)
    grad = torch.randn(10, 12, generator=generator)
    inputs = (x_RD, weight_EDF)
    for got, want in zip(
        torch.autograd.grad(y_RF, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sizes", [{"hidden_size": 30}, {"moe_intermediate_size": 10}])
def test_any_size_works_or_is_refused_by_the_configuration(sizes):
    try:
        config = small_config(**sizes)
    except ConfigError:
        return
    moe = MoE(config)
    moe(torch.zeros(1, 2, config.hidden_size), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize("real", [0, 7])
def test_what_is_computed_for_padding_reaches_nothing(real):
    """Rows that no expert computes hold whatever the memory held: here it holds NaN."""
    module = Experts(small_config())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    x_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gates_NK = torch.rand(N, K, generator=torch.Generator().manual_seed(2)).requires_grad_()
    experts_NK = random_experts(K).masked_fill(torch.arange(N)[:, None] >= real, -1)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        out_ND = routed(module, x_ND, experts_NK, gates_NK)
        out_ND.square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for values, shape in ((out_ND, D), (x_ND.grad, D), (gates_NK.grad, K)):
        assert values.isfinite().all() and values[:real].ne(0).all()
        assert torch.equal(values[real:], torch.zeros(N - real, shape))
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("missing", [0, 3])
def test_sums_of_rows_are_those_of_fp64_with_and_without_rows_that_are_missing(missing):
    x_RD = torch.randn(24, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows_NK = torch.randperm(24, generator=torch.Generator().manual_seed(1)).view(8, 3)
    rows_NK[:missing, 0] = -1
    exact_ND = (x_RD.double()[rows_NK.clamp(min=0)] * (rows_NK >= 0)[..., None]).sum(1)
    assert (sum_of_rows(x_RD, rows_NK).double() - exact_ND).norm() <= 3e-3 * exact_ND.norm()
