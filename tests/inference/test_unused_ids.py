"""Ids without text are never drawn, by any road: here a model would draw them nearly always."""

import json

import pytest
import torch

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.hub.tokens import write_generation_config
from dsv3_lightning.inference.batching import Engine, Job
from dsv3_lightning.inference.chat import Chat
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.generate import generate
from dsv3_lightning.inference.needle import find_needles, score
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.speculative import speculate
from tests.hub.folders import biased, exported
from tests.model.small import small_config

ROWS = 400


@pytest.fixture(scope="module")
def tokenizer():
    """276 ids, with a gap."""
    trained = Tokenizer.train(["plain words to draw, 12 34"] * 3, 275)
    description = json.loads(trained.serialized)
    description["added_tokens"][-1]["id"] = 290
    description["model"]["vocab"][description["added_tokens"][-1]["content"]] = 290
    return Tokenizer(json.dumps(description))


@pytest.fixture(scope="module")
def model(tokenizer):
    """The head's rows of ids without text are far larger than those with one."""
    model = biased(small_config(vocab_size=ROWS, num_nextn_predict_layers=2))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.ids_without_text(ROWS)] *= 30
    return model


SAMPLINGS = [Sampling(), Sampling(5.0), Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5), Sampling(1e-8)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_decoding_and_drafts_draw_ids_with_text_only(model, tokenizer, sampling):
    unused = tokenizer.ids_without_text(ROWS)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("plain", "words to")]
    bad = [token for ids in decode(model, prompts, 40, sampling, set(), 0) for token in ids if token in set(unused)]
    assert len(bad) > 20, "the model doesn't want to draw them, so this test shows nothing"
    texts = decode(model, prompts, 40, sampling, set(), 0, unused=unused)
    texts += [speculate(model, prompt, 40, sampling, set(), 0, 2, unused=unused)[0] for prompt in prompts]
    texts += generate(model, prompts, 40, sampling, ROWS - 1, 0, unused)
    assert all(len(ids) == 40 for ids in texts) and not {token for ids in texts for token in ids} & set(unused)
    if sampling.temperature == 0:
        assert texts[:2] == texts[2:4] == texts[4:]


def test_drafts_are_of_ids_with_text_too(model, tokenizer):
    """A draft that can't be drawn would never be accepted; greedy text of a model whose modules agree accepts some."""
    unused = tokenizer.ids_without_text(ROWS)
    _, drafts = speculate(model, [tokenizer.bos_id, 70], 100, Sampling(5.0), set(), 0, 2, unused=unused)
    assert drafts.accepted[0] > 10


def test_server_and_chat_draw_ids_with_text_only(model, tokenizer):
    seen: list[int] = []

    def noting(bytes_of):
        return lambda token: seen.append(token) or bytes_of(token)

    import threading

    copy = Tokenizer(tokenizer.serialized)
    copy.bytes_of = noting(copy.bytes_of)  # type: ignore[method-assign]
    copy.end_ids = set()
    engine, done = Engine(model, copy, 2, 2, 60.0), threading.Event()
    job = Job([0, 70], 40, Sampling(5.0), 0, (), lambda _, finish, __: done.set() if finish else None)
    engine.submit([job])
    assert done.wait(60)
    engine.close()
    assert job.tokens == 40
    list(Chat(model, copy, Sampling(5.0), 0, "").reply("hello", 40))
    assert len(seen) >= 80 and not set(seen) & set(tokenizer.ids_without_text(ROWS))


def test_the_needle_is_judged_among_ids_with_text(model, tokenizer):
    unused, filler = tokenizer.ids_without_text(ROWS), tokenizer.encode("plain words " * 40)
    ids = [0, *filler[:40]]
    right, likely = score(model, ids, 5, unused)
    logits = model(torch.tensor([ids]))[0, -6:-1].double().detach()
    logits[:, unused] = -torch.inf
    wanted = torch.tensor(ids[-5:])
    assert likely == pytest.approx(logits.log_softmax(-1).gather(1, wanted[:, None]).mean().item(), abs=1e-4)
    assert right == (logits.argmax(-1) == wanted).double().mean()
    found = find_needles(model, tokenizer, filler, [110], [0.5], 1)
    assert found.saved.isfinite().all()


@pytest.mark.slow
def test_transformers_draws_none_from_an_export(model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = exported(model, tmp_path / "out")
    unused = tokenizer.ids_without_text(ROWS)
    prompt = torch.tensor([[0, 70, 71]])
    drawn = {}
    for name, suppressed in (("without", []), ("with", unused)):
        write_generation_config(tokenizer, folder, suppressed)
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(0)
        wanted = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 40, "eos_token_id": []}
        drawn[name] = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **wanted)[0, 3:].tolist()
    assert set(drawn["without"]) & set(unused) and not set(drawn["with"]) & set(unused)
    assert len(drawn["with"]) == 40
