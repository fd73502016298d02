"""The server as OpenAI's own client sees it: right answers to many at once, reasons for refusals, no row lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.batching import check_engine
from dsv3_lightning.inference.chat import chat_prompt
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.sampling import Sampling
from tests.hub.folders import exported

openai = pytest.importorskip("openai")  # of the extras serve and dev
serving = pytest.importorskip("tests.inference.serving", exc_type=ImportError)
Served, assert_refused = serving.Served, serving.assert_refused


def expected(model, tokenizer, prompt: list[int], count: int, sampling=None, seed: int = 0) -> str:
    (ids,) = decode(model, [prompt], count, sampling or Sampling(), {tokenizer.eos_id}, seed)
    return tokenizer.decode(ids)


def test_completions_models_and_usage(served, model, tokenizer):
    assert [m.id for m in served.client.models.list()] == ["small"]
    ids = [tokenizer.bos_id, *tokenizer.encode("def ")]
    for prompt in ("def ", ids):
        answer = served.client.completions.create(model="small", prompt=prompt, max_tokens=20, temperature=0)
        assert answer.choices[0].text == expected(model, tokenizer, ids, 20)
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 20)


@pytest.mark.parametrize("prompts", [["a", "def f"], ["a", "a"]])
def test_several_prompts_and_copies_each_have_random_numbers_of_their_own(served, model, tokenizer, prompts):
    answer = served.client.completions.create(
        model="small", prompt=prompts, n=2, seed=7, max_tokens=12, temperature=1.0, extra_body={"top_k": 50}
    )
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts for _ in range(2)]
    wanted = decode(model, ids, 12, Sampling(1.0, 50), {tokenizer.eos_id}, seed=7)
    texts = [choice.text for choice in sorted(answer.choices, key=lambda c: c.index)]
    assert texts == [tokenizer.decode(new) for new in wanted] and len(set(texts)) == 4


def test_streams_join_to_the_answer_in_whole_characters(served):
    options = {"model": "small", "prompt": "日", "max_tokens": 60, "temperature": 1.0, "seed": 3}
    whole = served.client.completions.create(**options).choices[0]
    events = list(served.client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].text for e in events if e.choices) == whole.text
    assert events[-2].choices[0].finish_reason == whole.finish_reason and events[-1].usage.completion_tokens > 0
    stop = whole.text[5:7]
    cut = served.client.completions.create(**options, stop=[stop]).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"


def test_chat(served, model, tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    prompt = chat_prompt(tokenizer, [("system", "be brief"), ("user", "hello")])
    options = {"model": "small", "messages": messages, "max_completion_tokens": 15, "temperature": 0}
    answer = served.client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected(model, tokenizer, prompt, 15)
    pieces = served.client.chat.completions.create(**options, stream=True)
    assert "".join(p.choices[0].delta.content for p in pieces) == answer.choices[0].message.content


def test_a_chat_in_the_models_own_format_is_refused_and_completions_are_not(model, tokenizer):
    foreign = Tokenizer(tokenizer.serialized)
    foreign.chat_template = "{{ messages[0]['content'] }}"
    served = Served(model, foreign)
    with pytest.raises(openai.BadRequestError, match="the model's chat_template is not the one"):
        served.client.chat.completions.create(model="small", messages=[{"role": "user", "content": "hello"}])
    answer = served.client.completions.create(model="small", prompt="def ", max_tokens=3)
    served.close()
    assert answer.usage.completion_tokens == 3


def test_the_chunks_of_a_chat_name_the_role_once_per_choice(served):
    options = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "temperature": 0}
    with served.client.chat.completions.stream(**options, n=2) as chunks:  # this client joins the strings of its chunks
        chunks.until_done()
        answer = chunks.current_completion_snapshot
    whole = served.client.chat.completions.create(**options)
    assert [choice.message.role for choice in answer.choices] == ["assistant", "assistant"]
    assert [choice.message.content for choice in answer.choices] == [whole.choices[0].message.content] * 2


@pytest.mark.slow
def test_32_clients_at_once_get_their_own_answers(served, model, tokenizer):
    """More than there are rows; each with another prompt and length, half of them streaming."""
    prompts = [f"{'x' * (i % 7)} def {i}" for i in range(32)]
    wanted = [
        expected(model, tokenizer, [tokenizer.bos_id, *tokenizer.encode(p)], 5 + i) for i, p in enumerate(prompts)
    ]

    def ask(i: int) -> str:
        options = {"model": "small", "prompt": prompts[i], "max_tokens": 5 + i, "temperature": 0}
        if i % 2:
            return served.client.completions.create(**options).choices[0].text
        return "".join(e.choices[0].text for e in served.client.completions.create(**options, stream=True))

    with ThreadPoolExecutor(32) as pool:
        for _ in range(2):
            assert list(pool.map(ask, range(32))) == wanted
    assert served.idle()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_frees_its_row(served, model, tokenizer, streaming, monkeypatch):
    """Long before its texts end: 500 steps that take ten seconds and more, and tokens come all the time."""
    prompt = [tokenizer.bos_id, *tokenizer.encode("a")]
    assert len(decode(model, [prompt], 500, Sampling(), {tokenizer.eos_id}, 0)[0]) == 500
    step = served.engine.step
    monkeypatch.setattr(served.engine, "step", lambda: (time.sleep(0.02), step()))
    body = {"model": "small", "prompt": "a", "max_tokens": 500, "temperature": 0, "stream": streaming, "n": 4}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    with socket.create_connection(served.socket.getsockname()) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        while not served.engine.running:
            time.sleep(0.005)
        jobs, left = list(served.engine.running), time.monotonic()
    assert served.idle() and time.monotonic() < left + 5
    assert max(job.tokens for job in jobs) < 250
    answer = served.client.completions.create(model="small", prompt="a", max_tokens=1)
    assert answer.usage.completion_tokens <= 1


@pytest.mark.parametrize(
    "changes, status, message",
    [
        ({"model": "other"}, 404, "model 'other': there is only 'small'"),
        ({"temperature": -1}, 400, "temperature=-1.0: must be at least 0"),
        ({"top_p": 2}, 400, "top_p=2.0: must be between 0 and 1"),
        ({"max_tokens": -1}, 400, "max_tokens=-1: must be a whole number from 0 to"),
        ({"prompt": "x " * 600}, 400, "tokens is longer than the context of 512 tokens"),
        ({"prompt": []}, 400, "prompt: must not be an empty list"),
        ({"prompt": [[]]}, 400, "a prompt has no tokens"),
        ({"prompt": [10**6]}, 400, "prompt: a token lies outside 0 to"),
        ({"prompt": None}, 400, "prompt"),
        ({"logit_bias": {"1": 5}}, 400, 'logit_bias={"1": 5}: is not supported here; leave it out, or give {}'),
        ({"logprobs": 21}, 400, "logprobs=21: must be a whole number from 0 to 20"),
        ({"store": True}, 400, "store=true: is not supported here; leave it out, or give false"),
        ({"n": 0}, 400, "n=0: must be a whole number from 1 to 64"),
    ],
)
def test_a_bad_request_gets_a_reason(served, changes, status, message):
    body = {"model": "small", "prompt": "a", "max_tokens": 2} | changes
    assert_refused(served, "/v1/completions", body, status, message)


NULLS = "max_tokens temperature top_p n stop seed stream stream_options presence_penalty frequency_penalty logit_bias"
NULLS = dict.fromkeys([*NULLS.split(), "logprobs", "user", "metadata"])
NOTHING = {"logit_bias": {}, "metadata": {}, "store": False, "presence_penalty": 0.0, "stop": []}


@pytest.mark.parametrize("extra", [NULLS | dict.fromkeys(["echo", "best_of", "suffix"]), NOTHING | {"suffix": ""}])
def test_a_null_or_a_value_that_changes_nothing_is_as_good_as_absent(served, extra):
    greedy = {} if "temperature" in extra else {"temperature": 0}
    plain = {"model": "small", "prompt": "a"} | greedy
    answer = served.client.completions.create(**plain, extra_body=extra)
    assert len(answer.choices) == 1 and answer.usage.completion_tokens <= 16  # the default
    if greedy:
        assert answer.choices[0].text == served.client.completions.create(**plain).choices[0].text


@pytest.mark.parametrize(
    "extra",
    [
        NULLS | dict.fromkeys(["max_completion_tokens", "top_logprobs", "tools", "response_format", "store"]),
        NOTHING | {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False},
    ],
)
def test_the_same_in_a_chat(served, extra):
    messages = [{"role": "user", "content": "hello"}]
    answer = served.client.chat.completions.create(
        model="small", messages=messages, extra_body={"max_completion_tokens": 5} | extra
    )
    assert len(answer.choices) == 1 and answer.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("extra", [{"tools": [{}]}, {"response_format": {"type": "json_object"}}])
def test_a_chat_field_that_would_change_the_answer_is_refused(served, extra):
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1} | extra
    assert_refused(served, "/v1/chat/completions", body, 400, f"{next(iter(extra))}=")


def test_a_bad_chat_gets_a_reason(served):
    body = {"model": "small", "messages": [{"role": "tool", "content": "x"}]}
    assert_refused(
        served, "/v1/chat/completions", body, 400, 'messages.0.role="tool": must be system, user or assistant'
    )
    assert_refused(served, "/v1/chat/completions", body | {"messages": []}, 400, "messages")


def test_limits_of_waiting_and_of_time(model, tokenizer):
    served = Served(model, tokenizer, rows=1, waiting=0, seconds=0.2)
    try:
        body = {"model": "small", "prompt": "a", "max_tokens": 500, "temperature": 0}
        served.engine.running.append(object())  # the thread sleeps: it looks at its rows when a text comes
        assert_refused(served, "/v1/completions", body, 429, "0 requests are waiting already")
        served.engine.running.clear()
        model_step = served.engine.step

        def overslept() -> None:
            model_step()
            time.sleep(0.3)

        served.engine.step = overslept  # type: ignore[method-assign]
        assert_refused(served, "/v1/completions", body, 504, "not finished within 0.2 seconds")
        assert served.idle()
    finally:
        served.close()


def test_more_texts_than_ever_fit_are_refused_for_good(served):
    """4 slots and 64 waiting: 68 fit, 69 never will, however often one tries again."""
    options = {"model": "small", "max_tokens": 1}
    assert len(served.client.completions.create(prompt=["a"] * 68, **options).choices) == 68
    with pytest.raises(openai.BadRequestError, match="69 texts in one request: slots=4 and max_waiting=64 hold 68"):
        served.client.completions.create(prompt=["a"] * 69, **options)
    with pytest.raises(openai.BadRequestError, match="70 texts"):
        served.client.completions.create(prompt=["a"] * 35, n=2, **options)


@pytest.mark.parametrize("sizes, name", [((0, 1, 1.0), "slots"), ((1, -1, 1.0), "max_waiting"), ((1, 1, 0), "timeout")])
def test_impossible_sizes_are_one_line(sizes, name):
    with pytest.raises(ConfigError, match=name):
        check_engine(*sizes)


def test_an_error_while_decoding_reaches_the_client_and_the_next_one_is_served(served, monkeypatch):
    extend = served.engine.decoder.extend
    monkeypatch.setattr(served.engine.decoder, "extend", lambda *_: 1 / 0)
    assert_refused(served, "/v1/completions", {"model": "small", "prompt": "a"}, 500, "decoding failed")
    monkeypatch.setattr(served.engine.decoder, "extend", extend)
    assert served.client.completions.create(model="small", prompt="a", max_tokens=3).usage.completion_tokens <= 3


SLOW = """
import sys, time
from dsv3_lightning.cli import main
from dsv3_lightning.inference import batching
from dsv3_lightning.inference.server import run
step = batching.Engine.step
batching.Engine.step = lambda engine: (time.sleep(0.1), step(engine))
run.LAST_ANSWERS = 1
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_is_one_line_and_every_client_hears_of_it(model, tokenizer, tmp_path, presses):
    """500 steps of 0.1 seconds, and one second to end them; a second Ctrl-C doesn't wait for that."""
    folder = exported(model, tmp_path / "small")
    tokenizer.save(folder)
    command = [sys.executable, "-c", SLOW, "serve", str(folder), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as process:
        url = process.stdout.readline().split("; ")[-1].strip()
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        options = {"model": "small", "prompt": "a", "max_tokens": 500, "temperature": 0}

        def ask(streaming: bool) -> Exception | None:
            try:
                list(client.completions.create(**options, stream=streaming))
            except openai.APIError as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            plain, streamed = pool.submit(ask, False), pool.submit(ask, True)
            health = f"{url.removesuffix('/v1')}/health"
            while json.loads(urllib.request.urlopen(health).read())["running"] < 2:
                time.sleep(0.05)
            for _ in range(presses):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            out, err = process.communicate(timeout=30)
    assert (out, err) == ("dsv3: stopping; texts in the making get 1 seconds\n", "")
    assert process.returncode == 130
    if presses == 1:
        assert plain.result().status_code == 503 and "the server is shutting down" in str(plain.result())
        assert str(streamed.result()) == "the server is shutting down"
