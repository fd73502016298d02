"""Log-probabilities and token endpoints of the server, as OpenAI's client and lm-evaluation-harness read them."""

import json
from pathlib import Path

import pytest

from dsv3_lightning.inference.scoring import score

pytest.importorskip("openai")  # of the extras serve and dev
from dsv3_lightning.inference.server.logprobs import name_of  # noqa: E402

serving = pytest.importorskip("tests.inference.serving", exc_type=ImportError)
assert_refused = serving.assert_refused

RECORDED = json.loads((Path(__file__).parent / "harness_requests.json").read_text(encoding="utf-8"))
PROMPTS = [[0, 40, 41, 42, 43, 44], [0, 60], [70], [0, *range(50, 90)]]  # a batch of mixed lengths


def post(served, path, body):
    status, _, answer = served.ask("POST", path, json.dumps(body).encode())
    assert status == 200, answer
    return json.loads(answer)


def as_the_harness_reads(answer, contexts):
    """(log-probability, greedy) of each continuation, as `LocalCompletionsAPI.parse_logprobs` of the harness has it."""
    found = []
    for choice, context in zip(sorted(answer["choices"], key=lambda choice: choice["index"]), contexts, strict=True):
        log_p = choice["logprobs"]["token_logprobs"][context:-1]
        top = choice["logprobs"]["top_logprobs"][context:-1]
        found.append((sum(log_p), all(one == max(named.values()) for one, named in zip(log_p, top, strict=True))))
    return found


@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "ends at once"])
def test_the_harness_reads_the_scores_of_every_continuation(served, model, tokenizer, ends, monkeypatch):
    """Also where the new token is an end token, which has no text but counts as the one new token."""
    if ends:
        monkeypatch.setattr(tokenizer, "end_ids", set(range(model.config.vocab_size)))
    body = RECORDED["loglikelihood"] | {"model": "small", "prompt": PROMPTS}
    answer = post(served, "/v1/completions", body)
    for choice, prompt in zip(answer["choices"], PROMPTS, strict=True):
        log = choice["logprobs"]
        assert {len(listed) for listed in log.values()} == {len(prompt) + 1}
        assert log["token_logprobs"][0] is None and log["top_logprobs"][0] is None
        for log_p, named in zip(log["token_logprobs"][1:], log["top_logprobs"][1:], strict=True):
            assert log_p in named.values() and len(named) <= 2
    contexts = [1, 1, 1, 30]
    expected = score(model, [(prompt[:n], prompt[n:]) for prompt, n in zip(PROMPTS, contexts, strict=True)])
    for (total, greedy), wanted in zip(as_the_harness_reads(answer, contexts), expected, strict=True):
        assert total == pytest.approx(wanted.total, abs=1e-4) and greedy == wanted.greedy


def test_what_greedy_decoding_writes_counts_as_greedy(served, tokenizer):
    body = {"model": "small", "prompt": [[0, 40]], "max_tokens": 5, "temperature": 0, "logprobs": 0}
    written = post(served, "/v1/completions", body)["choices"][0]["logprobs"]
    ids = [token for token in range(tokenizer.vocab_size) if name_of(tokenizer, token) == written["tokens"][0]]
    body |= {"prompt": [[0, 40, ids[0]]], "logprobs": 1, "echo": True, "max_tokens": 1}
    assert as_the_harness_reads(post(served, "/v1/completions", body), [2])[0][1]
    body |= {"prompt": [[0, 40, ids[0] + 1]]}
    assert not as_the_harness_reads(post(served, "/v1/completions", body), [2])[0][1]


@pytest.mark.parametrize("prompt", ["日本語 and 👍", "", [0, 0, 40]])
def test_echo_is_the_prompt_and_every_token_lies_where_its_offset_says(served, tokenizer, prompt):
    """The begin token that the server adds to a text is listed and has no text; parts of characters have names."""
    body = {"model": "small", "prompt": prompt, "max_tokens": 24, "temperature": 1.0, "seed": 5, "logprobs": 3}
    plain = post(served, "/v1/completions", body)["choices"][0]
    choice = post(served, "/v1/completions", body | {"echo": True})["choices"][0]
    shown = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    assert choice["text"] == shown + plain["text"] and len(plain["logprobs"]["tokens"]) == 24
    log = choice["logprobs"]
    placed = list(zip(log["tokens"], log["text_offset"], strict=True))
    for token, offset in placed[isinstance(prompt, str) :]:
        assert token.startswith("bytes:") or choice["text"][offset : offset + len(token)] == token
    assert log["tokens"][-24:] == plain["logprobs"]["tokens"]
    assert log["token_logprobs"][-24:] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-5)
    assert post(served, "/v1/completions", {**body, "logprobs": None, "echo": True})["choices"][0] == choice | {
        "logprobs": None
    }
    none = post(served, "/v1/completions", body | {"echo": True, "max_tokens": 0})["choices"][0]
    assert none["text"] == shown and none["logprobs"]["token_logprobs"] == log["token_logprobs"][:-24]


def test_a_stream_has_the_scores_of_the_whole_answer(served):
    options = {
        "model": "small",
        "prompt": "日",
        "max_tokens": 40,
        "temperature": 1.0,
        "seed": 3,
        "logprobs": 2,
        "echo": True,
    }
    whole = served.client.completions.create(**options).choices[0]
    chunks = [chunk.choices[0] for chunk in served.client.completions.create(**options, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert sum((getattr(chunk.logprobs, name) for chunk in chunks if chunk.logprobs), []) == getattr(
            whole.logprobs, name
        )
    stop = whole.text[9:11]
    cut = served.client.completions.create(**options, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop" and all(offset < len(cut.text) for offset in cut.logprobs.text_offset)
    assert cut.logprobs.tokens == whole.logprobs.tokens[: len(cut.logprobs.tokens)]


def test_a_chat_lists_the_bytes_of_its_answer_with_the_most_likely_tokens(served):
    messages = [{"role": "user", "content": "日本"}]
    options = {"model": "small", "messages": messages, "max_tokens": 30, "temperature": 1.0, "seed": 1}
    answer = served.client.chat.completions.create(**options, logprobs=True, top_logprobs=4).choices[0]
    listed = answer.logprobs.content
    assert bytes(byte for one in listed for byte in one.bytes).decode("utf-8", "replace") == answer.message.content
    for one in listed:
        ranked = [top.logprob for top in one.top_logprobs]
        assert len(ranked) == 4 and ranked == sorted(ranked, reverse=True) and one.logprob <= ranked[0] <= 0
        assert all(top.logprob == one.logprob for top in one.top_logprobs if top.bytes == one.bytes)
    with served.client.chat.completions.stream(**options, logprobs=True, top_logprobs=4) as chunks:
        for _ in chunks:
            streamed = chunks.current_completion_snapshot.choices[0]
    assert streamed.logprobs.content == listed and streamed.message.content == answer.message.content
    bare = served.client.chat.completions.create(**options, logprobs=True).choices[0].logprobs.content
    assert [(one.logprob, one.top_logprobs) for one in bare] == [(one.logprob, []) for one in listed]
    assert served.client.chat.completions.create(**options).choices[0].logprobs is None
    body = options | {"top_logprobs": 2}
    assert_refused(served, "/v1/chat/completions", body, 400, "top_logprobs=2: needs logprobs=true")


def test_scores_by_position_are_never_cut_short_by_the_context(served, model):
    limit = model.config.max_position_embeddings
    body = RECORDED["loglikelihood"] | {"model": "small", "prompt": [[5] * (limit - 1)]}
    assert len(post(served, "/v1/completions", body)["choices"][0]["logprobs"]["tokens"]) == limit
    wanted = (
        f"max_tokens=1: with echo and logprobs {limit} tokens of prompt and 1 new ones must fit the context of {limit}"
    )
    assert_refused(served, "/v1/completions", body | {"prompt": [[5] * limit]}, 400, wanted)


def test_tokens_and_texts_are_those_of_the_tokenizer(served, tokenizer):
    """The harness asks for the id of the end token by its name; in a longer text no name is a token."""
    info = json.loads(served.ask("GET", "/tokenizer_info")[2])
    assert post(served, "/tokenize", RECORDED["tokenize"] | {"prompt": info["eos_token"]})["tokens"] == [
        tokenizer.eos_id
    ]
    text = "日本語 and 👍 " + info["eos_token"]
    answer = post(served, "/tokenize", RECORDED["tokenize"] | {"prompt": text})
    assert answer["tokens"] == tokenizer.encode(text) and answer["count"] == len(answer["tokens"])
    assert post(served, "/detokenize", RECORDED["detokenize"] | {"tokens": answer["tokens"]}) == {"prompt": text}
    marked = post(served, "/tokenize", {"prompt": text, "parse_special": True, "return_token_strs": True})
    assert marked["tokens"][0] == tokenizer.bos_id and marked["tokens"][-1] == tokenizer.eos_id
    assert len(marked["token_strs"]) == marked["count"]
    assert_refused(served, "/detokenize", {"tokens": [10**6]}, 400, "tokens: a token lies outside 0 to")
    assert_refused(served, "/detokenize", {"tokens": "x"}, 400, 'tokens="x": must be a list of token ids')
    assert_refused(served, "/tokenize", {"text": "x"}, 400, "text: is not supported here")


@pytest.mark.parametrize("kind", ["generate_until", "chat"])
def test_the_harness_generates(served, kind):
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    answer = post(served, path, RECORDED[kind] | {"model": "small"})
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    for choice in answer["choices"]:
        text = choice["message"]["content"] if kind == "chat" else choice["text"]
        assert isinstance(text, str) and not any(stop in text for stop in RECORDED[kind]["stop"])
