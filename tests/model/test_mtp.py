"""Multi-token prediction: who sees and predicts which token, and the losses of V3 eq. 21-25 written out again."""

import pytest
import torch
from torch import Tensor

from dsv3_lightning.model.losses import IGNORE
from dsv3_lightning.model.rope import cos_sin
from dsv3_lightning.model.transformer import Transformer

from .small import Batch, clear_batch, make_targets, small_batch, small_config, small_model


def losses_per_position(model: Transformer, tokens_BS: Tensor, mask_BS: Tensor, targets_BPT: Tensor) -> Tensor:
    """[1 + depth, T] of sample 0: all targets but one are ignored, one after another."""
    _, heads, T = targets_BPT.shape
    nll_PT = torch.empty(heads, T)
    for k in range(heads):
        for i in range(T):
            only = torch.full_like(targets_BPT, IGNORE)
            only[0, k, i] = targets_BPT[0, k, i]
            nll_P = model.losses(tokens_BS, mask_BS, only).nll_P
            assert nll_P.count_nonzero() <= 1
            nll_PT[k, i] = nll_P[k]
    return nll_PT


@pytest.mark.slow
@torch.no_grad()
def test_module_k_at_i_sees_the_tokens_up_to_i_plus_k_and_is_judged_by_the_next():
    # With the targets held fixed, token j may move the loss of head k at i only where j <= i + k, and must do so there.
    # An embedding taken one place late sees its own target (j = i + k + 1); one taken early misses j = i + k.
    depth, T = 2, 6
    model = small_model(small_config(num_nextn_predict_layers=depth))
    batch = small_batch(model.config, B=1, T=T)
    before_PT = losses_per_position(model, *batch)
    for j in range(T + 1 + depth):
        tokens_BS = batch.tokens.clone()
        tokens_BS[0, j] = (tokens_BS[0, j] + 7) % model.config.vocab_size
        moved_PT = (losses_per_position(model, tokens_BS, batch.mask, batch.targets) - before_PT).abs()
        for k in range(1 + depth):
            for i in range(T):
                if j <= i + k:
                    assert moved_PT[k, i] > 1e-4, (j, k, i)
                else:
                    assert moved_PT[k, i] < 1e-5, (j, k, i)

        # Targets made from the tokens move exactly one place of each head: i = j - k - 1.
        expected = [[k, j - k - 1] for k in range(1 + depth) if 0 <= j - k - 1 < T]
        assert (make_targets(tokens_BS, depth) != batch.targets)[0].nonzero().tolist() == expected


def composed_losses(model: Transformer, batch: Batch, mistake: str = "") -> list[float]:
    """Eq. 21-25 with the norms, the concatenation, the head and the cross-entropy spelled out; fp64 from the logits on.

    Blocks are the model's own: transformers checks those. With `mistake`, a plausible slip.
    """
    depth, T = model.config.mtp_depth, batch.targets.shape[-1]
    E_VD, head_VD = model.embed_tokens.weight, model.lm_head.weight
    h_BTD = E_VD[batch.tokens[:, :T]]
    at = cos_sin(model.config, torch.arange(T))
    for block in model.layers:
        h_BTD = block(h_BTD, at, batch.mask[:, :T])[0]
    out_BTD = rms_norm(h_BTD, model.norm.weight)
    totals = [cross_entropy(out_BTD @ head_VD.T, batch.tokens[:, 1 : T + 1])]
    if mistake != "h_0 before the final norm":
        h_BTD = out_BTD
    for k, module in enumerate(model.mtp, start=1):
        shift = k + (mistake == "embedding one late") - (mistake == "embedding one early")
        embedding_BTD = E_VD[batch.tokens[:, shift : shift + T]]
        if mistake == "embedding of module 1 in every module":
            embedding_BTD = E_VD[batch.tokens[:, 1 : 1 + T]]
        halves = [rms_norm(embedding_BTD, module.enorm.weight), rms_norm(h_BTD, module.hnorm.weight)]
        if mistake == "hidden state first":
            halves.reverse()
        if mistake == "norms exchanged":
            halves = [rms_norm(embedding_BTD, module.hnorm.weight), rms_norm(h_BTD, module.enorm.weight)]
        joined_BTD = torch.cat(halves, -1) @ module.eh_proj.weight.T  # eq. 21
        still = cos_sin(model.config, torch.zeros(T, dtype=torch.int64))
        positions = still if mistake == "all positions 0" else at
        h_BTD = module.block(joined_BTD, positions, batch.mask[:, k : k + T])[0]  # eq. 22
        out_BTD = rms_norm(h_BTD, model.norm.weight if mistake == "the main model's norm" else module.norm.weight)
        place = k + 1 - (mistake == "targets of the head before")
        totals.append(cross_entropy(out_BTD @ head_VD.T, batch.tokens[:, place : place + T]))  # eq. 23, 24
        if mistake == "normed output to the next module":
            h_BTD = out_BTD
    assert len(totals) == 1 + depth
    return totals


MISTAKES = [
    "h_0 before the final norm",
    "embedding one early",
    "embedding one late",
    "embedding of module 1 in every module",
    "hidden state first",
    "norms exchanged",
    "all positions 0",
    "the main model's norm",
    "targets of the head before",
    "normed output to the next module",
]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> float:
    log_p = logits_BTV.double().log_softmax(-1)
    return -log_p.gather(-1, targets_BT[..., None]).sum().item()


@torch.no_grad()
@pytest.mark.parametrize("depth, T", [(0, 12), (1, 12), (2, 12), (3, 12), (2, 2), (2, 1)])
def test_losses_equal_the_equations(depth, T):
    model = small_model(small_config(num_nextn_predict_layers=depth))
    batch = clear_batch(model, T=T)
    losses = model.losses(*batch)
    assert losses.nll_P.tolist() == pytest.approx(composed_losses(model, batch), rel=2e-6)
    assert len(losses.counts_LE) == len(losses.balance["sequence"]) == 2 + depth  # the modules' routers report, too
    assert losses.counts_LE.sum(1).tolist() == [2 * T * 3] * (2 + depth)


@torch.no_grad()
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_gives_another_loss_on_these_inputs(mistake):
    model = small_model(small_config(num_nextn_predict_layers=2))
    batch = clear_batch(model)
    right, wrong = composed_losses(model, batch), composed_losses(model, batch, mistake)
    assert max(abs(a / b - 1) for a, b in zip(right, wrong, strict=True)) > 5e-4


@torch.no_grad()
def test_heads_before_the_last_do_not_depend_on_the_depth():
    models = [small_model(small_config(num_nextn_predict_layers=depth)) for depth in (0, 1, 2)]
    models[0].load_state_dict(models[2].state_dict(), strict=False)
    models[1].load_state_dict(models[2].state_dict(), strict=False)
    batch = clear_batch(models[2])
    deepest = models[2].losses(*batch)
    for depth in (0, 1):
        losses = models[depth].losses(batch.tokens, batch.mask, batch.targets[:, : 1 + depth])
        assert torch.equal(losses.nll_P, deepest.nll_P[: 1 + depth])
        assert torch.equal(losses.counts_LE, deepest.counts_LE[: 2 + depth])


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_one_parameter_for_all_depths(tied):
    names = {}
    for depth in (0, 2):
        model = Transformer(small_config(num_nextn_predict_layers=depth, tie_word_embeddings=tied))
        names[depth] = {name for name, p in model.named_parameters() if model.config.vocab_size in p.shape}
    assert names[0] == names[2] == {"embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})

    # Not copies: the loss of the last module alone reaches both, and rows of the embedding that only it looks up.
    model = small_model(model.config)
    batch = small_batch(model.config, B=1, T=4)
    batch.tokens[0] = torch.arange(7)
    model.losses(*batch).nll_P[2].backward()
    rows_V = model.embed_tokens.weight.grad.abs().sum(1) > 0
    assert rows_V[:6].all()  # i + 2 for the last i, 3
    assert model.lm_head.weight.grad.abs().min(1).values.min() > 0
    assert tied or not rows_V[6:].any()  # token 6 is only a target


@torch.no_grad()
def test_positions_of_a_module_count_as_the_main_models():
    # Rotations are relative, so module k may count from 0 or from k: but its places must be one apart, in order.
    config = small_config(num_nextn_predict_layers=1)
    model = small_model(config)
    x_BTD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones(2, 9, dtype=torch.bool)
    outputs = [
        model.mtp[0](x_BTD, x_BTD.flip(0), cos_sin(config, positions), mask_BT)[0]
        for positions in (torch.arange(9), torch.arange(9) + 5, 2 * torch.arange(9), torch.arange(9).flip(0))
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=2e-5)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-2
    assert (outputs[0] - outputs[3]).abs().max() > 1e-2


def test_sums_over_uneven_samples_add_up_to_the_batchs():
    # 11, 3, 1 and 0 valid targets of the main head; none at all for the modules in the last two: sums, not means, so
    # that any grouping of samples gives the same mean over the global count.
    config = small_config(num_nextn_predict_layers=2)
    model = small_model(config)
    batch = clear_batch(model, B=4, T=11, padding=(2, 10, 12, 13))
    valid_BP = (batch.targets != IGNORE).sum(-1)
    assert valid_BP.tolist() == [[11, 10, 9], [3, 2, 1], [1, 0, 0], [0, 0, 0]]
    whole = model.losses(*batch)
    # 12, 4, 2 and 1 real tokens: those that module k adds at its places, k on, count for its router.
    assert whole.counts_LE.sum(1).tolist() == [3 * (11 + 4 + 2 + 1)] * 2 + [3 * (11 + 3 + 1), 3 * (10 + 2)]
    whole.nll_P.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    parts = [model.losses(*(t[b : b + 1] for t in batch)) for b in range(4)]
    for part in parts:
        part.nll_P.sum().backward()
        assert torch.isfinite(part.nll_P).all()
    torch.testing.assert_close(torch.stack([part.nll_P for part in parts]).sum(0), whole.nll_P, rtol=1e-6, atol=0)
    assert parts[2].nll_P[1:].tolist() == [0, 0] and parts[3].nll_P.tolist() == [0, 0, 0]
    assert torch.equal(torch.stack([part.counts_LE for part in parts]).sum(0), whole.counts_LE)
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - gradients[name]).abs().max()
        assert difference <= 1e-5 * gradients[name].abs().max(), name


def test_a_sample_without_any_target_gives_zero_gradients():
    model = small_model(small_config(num_nextn_predict_layers=2))
    batch = small_batch(model.config, B=1, T=5, padding=(8,))
    losses = model.losses(*batch)
    (losses.nll_P.sum() + losses.balance["sequence"].sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() == 0, name
    assert losses.nll_P.tolist() == [0, 0, 0] and losses.counts_LE.sum() == 0


@torch.no_grad()
def test_parallel_heads_are_a_block_each_on_the_trunks_output():
    """arXiv 2404.19737 §2: head k guesses token i + k + 1 from h_0 at i, and from no token after i."""
    model = small_model(small_config(num_nextn_predict_layers=2, mtp_kind="parallel"))
    batch = clear_batch(model, T=11)
    losses = model.losses(*batch, draft=True)
    at, head_VD = cos_sin(model.config, torch.arange(11)), model.lm_head.weight
    h_BTD = model.trunk(model.embed_tokens(batch.tokens[:, :11]), batch.mask[:, :11])[0]
    logits = [h_BTD @ head_VD.T]
    for module in model.mtp:
        out_BTD = module.block(h_BTD, at, batch.mask[:, :11])[0]  # of h_0, not of the head before
        logits.append(rms_norm(out_BTD, module.norm.weight) @ head_VD.T)
    expected = [cross_entropy(logits[k], batch.tokens[:, k + 1 : k + 12]) for k in range(3)]
    assert losses.nll_P.tolist() == pytest.approx(expected, rel=2e-6)
    assert torch.equal(losses.drafts_BPT, torch.stack(logits, 1).argmax(-1))
    assert "eh_proj" not in "".join(dict(model.named_parameters())) and len(losses.counts_LE) == 2 + 2
    later = batch.tokens.clone()
    later[:, 11:] = (later[:, 11:] + 1) % 61  # what sequential modules embed
    assert torch.equal(model.losses(later, batch.mask, None, draft=True).drafts_BPT, losses.drafts_BPT)


@torch.no_grad()
def test_guesses_are_the_heads_most_likely_tokens_and_need_no_targets():
    model = small_model(small_config(num_nextn_predict_layers=1))
    batch = clear_batch(model, T=11)
    with_targets, without = model.losses(*batch, draft=True), model.losses(batch.tokens, batch.mask, None, draft=True)
    assert torch.equal(with_targets.drafts_BPT, without.drafts_BPT)
    assert torch.equal(without.drafts_BPT[:, 0], model(batch.tokens[:, :11]).argmax(-1))
    assert torch.equal(with_targets.counts_LE, without.counts_LE) and len(without.nll_P) == 0
    assert model.losses(*batch).drafts_BPT is None
