"""The model that lm-evaluation-harness calls gives the log-probabilities and texts of the model itself.

benchmarks/harness.py compares it with the harness's own models, on the harness's own requests.
"""

import importlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.sampling import Sampling
from tests.inference import harness_stub

NAME = "dsv3_lightning.inference.harness"


def request(*args):
    return SimpleNamespace(args=args)


@pytest.fixture
def harness(monkeypatch):
    if importlib.util.find_spec("lm_eval") is None:
        harness_stub.install(monkeypatch)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def test_without_the_harness_the_error_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'dsv3-lightning\[harness\]'"):
        importlib.import_module(NAME)


@torch.no_grad()
def log_p(model, ids, start):
    logits = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_log_likelihoods_are_those_of_the_models_forward_pass(harness, model, tokenizer):
    lm = harness.HarnessModel(model, tokenizer)
    asked = [("def f(x):", " return x"), ("日本語 ", "and"), ("", "def"), ("words", "日本語 and 👍 words" * 3)]
    got = lm.loglikelihood([request(*one) for one in asked])
    for (context, continuation), (total, greedy) in zip(asked, got, strict=True):
        before = [tokenizer.bos_id, *tokenizer.encode(context.rstrip())]
        ids = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
        assert total == pytest.approx(log_p(model, ids, len(before)), abs=1e-4) and greedy is False
    plain = harness.HarnessModel(model, tokenizer, add_bos_token=False)
    ids = tokenizer.encode("def f(x): return x")
    expected = log_p(model, ids, len(tokenizer.encode("def f(x):")))
    assert plain.loglikelihood([request(*asked[0])])[0][0] == pytest.approx(expected, abs=1e-4)


def test_a_long_text_is_scored_in_windows_each_token_once(harness, model, tokenizer):
    lm = harness.HarnessModel(model, tokenizer, max_length=16)
    text = "def f(x):\n    return x\n" * 5
    ids = tokenizer.encode(text)
    got = lm.loglikelihood_rolling([request(text), request("def")])
    expected, done, first = 0.0, 0, True
    while done < len(ids):  # windows of 16; the last one is full and scores only what is left
        end = min(done + 16, len(ids))
        window = [tokenizer.bos_id, *ids[:end]] if first else ids[end - 17 : end]
        expected += log_p(model, window, len(window) - (end - done))
        done, first = end, False
    assert len(ids) % 16 and len(ids) > 32 and got[0] == pytest.approx(expected, abs=1e-3)
    assert got[1] == pytest.approx(log_p(model, [tokenizer.bos_id, *tokenizer.encode("def")], 1), abs=1e-4)


def test_texts_are_those_of_decoding_up_to_a_stop_string(harness, model, tokenizer):
    lm = harness.HarnessModel(model, tokenizer)
    contexts = ["def ", "日本語", "x"]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(context)] for context in contexts]
    whole = [tokenizer.decode(ids) for ids in decode(model, prompts, 20, Sampling(), tokenizer.end_ids, 1)]
    settings = {"until": [], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}
    assert lm.generate_until([request(context, settings) for context in contexts]) == whole
    stop = whole[1][3:5]
    cut = lm.generate_until([request(contexts[1], {"until": stop, "max_gen_toks": 20})])
    assert cut == [whole[1][: whole[1].index(stop)]]
    sampled = {"temperature": 0.9, "top_p": 0.9, "max_gen_toks": 20}
    once = lm.generate_until([request(contexts[0], sampled)])
    assert once == lm.generate_until([request(contexts[0], sampled)]) != [whole[0]]


def test_a_chat_is_written_in_the_models_format(harness, model, tokenizer):
    lm = harness.HarnessModel(model, tokenizer)
    text = lm.apply_chat_template([{"role": "user", "content": "hello"}])
    from dsv3_lightning.inference.chat import chat_prompt

    assert lm.tok_encode(text) == chat_prompt(tokenizer, [("user", "hello")])


def test_what_the_harness_may_not_ask_is_one_line(harness, model, tokenizer):
    lm = harness.HarnessModel(model, tokenizer, max_length=8)
    with pytest.raises(ConfigError, match="generation_kwargs.num_beams: is not supported here"):
        lm.generate_until([request("x", {"num_beams": 4})])
    with pytest.raises(ConfigError, match="max_gen_toks=8: leaves no room in max_length=8"):
        lm.generate_until([request("x", {"max_gen_toks": 8})])
    with pytest.raises(ConfigError, match="a continuation of .* tokens is above max_length=8"):
        lm.loglikelihood([request("x", "日本語 and 👍 words" * 3)])
    with pytest.raises(ConfigError, match="max_length=1: must be between 2 and 512"):
        harness.HarnessModel(model, tokenizer, max_length=1)
