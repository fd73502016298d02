"""Initial weights: the report's distribution, and a stream of random numbers for each parameter alone."""

import math

import pytest
import torch
from torch import Tensor

from dsv3_lightning.model.transformer import Transformer

from .small import small_config


def initial(seed: int = 1, device: str = "cpu", **changes) -> dict[str, Tensor]:
    with torch.device(device):
        model = Transformer(small_config(**changes))
    if device == "meta":
        model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan)  # whatever init_weights leaves out is seen
    model.init_weights(seed)
    return model.state_dict()


def assert_equal_where_shared(few: dict[str, Tensor], many: dict[str, Tensor]) -> None:
    assert few.keys() <= many.keys()
    for name, tensor in few.items():
        assert torch.equal(tensor, many[name]), name


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    torch.manual_seed(0)
    first = initial(1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = Transformer(small_config())
    torch.set_rng_state(before)
    model.init_weights(1)
    assert torch.equal(torch.get_rng_state(), before)  # nor does it move the global stream
    assert_equal_where_shared(first, model.state_dict())


def test_another_seed_gives_another_matrix_everywhere():
    one, two = initial(1), initial(2)
    for name, tensor in one.items():
        if tensor.dim() > 1:
            assert (tensor == two[name]).float().mean() < 0.01, name


def test_an_mtp_module_more_leaves_all_others_as_they_are():
    without, one, two = (initial(num_nextn_predict_layers=depth) for depth in (0, 1, 2))
    assert_equal_where_shared(without, one)
    assert_equal_where_shared(one, two)


def test_an_expert_more_leaves_the_others_as_they_are():
    few, many = initial(n_routed_experts=8), initial(n_routed_experts=16)
    for name, weight in few.items():
        if "experts." in name and weight.dim() == 3:
            assert torch.equal(weight, many[name][:8]), name
            assert not torch.equal(weight[0], weight[1]), name


def test_a_layer_more_leaves_all_others_as_they_are():
    assert_equal_where_shared(
        initial(num_hidden_layers=3, num_nextn_predict_layers=1),
        initial(num_hidden_layers=4, num_nextn_predict_layers=1),
    )


def test_tying_the_head_leaves_all_others_as_they_are():
    tied = initial(tie_word_embeddings=True)
    assert torch.equal(tied["lm_head.weight"], tied["embed_tokens.weight"])
    del tied["lm_head.weight"]
    assert_equal_where_shared(tied, initial())


def test_no_two_matrices_are_alike():
    # One stream, restarted for each parameter, would make equal shapes equal, and others begin alike.
    starts = [tuple(tensor.flatten()[:4].tolist()) for tensor in initial().values() if tensor.dim() > 1]
    assert len(set(starts)) == len(starts) > 30


@pytest.mark.parametrize("std", [0.006, 0.15])
def test_matrices_are_normal_with_the_given_std_norms_are_1_and_biases_0(std):
    state = initial(initializer_range=std, num_nextn_predict_layers=1, hidden_size=128, moe_intermediate_size=64)
    for name, tensor in state.items():
        if "expert_bias" in name:
            assert tensor.tolist() == [0.0] * 8 and tensor.dtype == torch.float32, name
        elif tensor.dim() == 1:
            assert (tensor == 1).all(), name
        else:
            n, z = tensor.numel(), tensor.double() / std
            assert abs(z.mean()) < 4.5 / n**0.5, name
            assert abs(z.std() - 1) < 4.5 / (2 * n) ** 0.5, name
            # a uniform of the same std has a fourth moment of 1.8, and one cut at 2 std has 2.1 or less
            assert abs(z.pow(4).mean() - 3) < 4.5 * (96 / n) ** 0.5, name
            if tensor.dim() == 3:  # not one expert copied, nor a std that depends on the stacking
                assert (abs(z.std((1, 2)) - 1) < 4.5 / (2 * n / len(z)) ** 0.5).all(), name
                assert (z[0] != z[1]).all(), name


def test_weights_made_after_the_meta_device_are_the_same():
    assert_equal_where_shared(initial(), initial(device="meta"))


def test_a_tied_head_stays_tied_after_the_meta_device():
    with torch.device("meta"):
        model = Transformer(small_config(tie_word_embeddings=True))
    model.to_empty(device="cpu").init_weights(1)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert_equal_where_shared(model.state_dict(), initial(tie_word_embeddings=True))
