"""What the server makes of a request: every field is honored or refused by name, whoever sends it, and in time."""

import json
import threading
import urllib.request

import pytest

from dsv3_lightning.data.text.tokenizer import ASSISTANT, BOS, USER, Tokenizer
from dsv3_lightning.inference.chat import chat_prompt

openai = pytest.importorskip("openai")  # of the extras serve and dev
serving = pytest.importorskip("tests.inference.serving", exc_type=ImportError)
Served, assert_refused = serving.Served, serving.assert_refused

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "small", "messages": HELLO, "max_tokens": 5, "temperature": 0}
COMPLETION = {"model": "small", "prompt": "a", "max_tokens": 5, "temperature": 0}
NOTHING = {  # for both kinds, as today's clients send them
    "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "metadata": {"a": "b"},
    "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y", "prompt_cache_retention": "24h",
    "prompt_cache_options": {"ttl": "30m"}, "seed": -5, "stop": [], "stream_options": {"include_usage": True},
    "repetition_penalty": 1.0, "ignore_eos": False, "stop_token_ids": [], "min_tokens": 0, "best_of": 1.0, "top_k": -1,
    "use_beam_search": False, "length_penalty": 1.0, "include_stop_str_in_output": False, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "priority": 0, "min_p": 0, "repeat_penalty": 1.0, "mirostat": 0,
    "typical_p": 1.0, "cache_prompt": True, "response_format": {"type": "text"}, "n": 1.0, "store": False,
    "prompt_logprobs": None, "guided_json": None, "structured_outputs": None,
}  # fmt: skip
NOTHING_IN_A_CHAT = {
    "parallel_tool_calls": False, "tool_choice": "auto", "tools": [], "functions": [], "function_call": "none",
    "verbosity": "medium", "modalities": ["text"], "prediction": None, "audio": None, "web_search_options": None,
    "logprobs": False, "top_logprobs": 0, "reasoning_effort": "medium", "add_generation_prompt": True,
    "continue_final_message": False, "chat_template_kwargs": {}, "echo": False, "moderation": None,
}  # fmt: skip
NOTHING_IN_A_COMPLETION = {"echo": False, "suffix": "", "logprobs": None, "add_special_tokens": True}


def test_fields_that_change_nothing_change_nothing(served):
    """Alone, all together, and as nulls."""
    chat, completion = served.client.chat.completions, served.client.completions
    plain = chat.create(**CHAT).choices[0].message.content
    extra = NOTHING | NOTHING_IN_A_CHAT
    for fields in (extra, dict.fromkeys(extra), {"parallel_tool_calls": True}, {"tool_choice": "none"}):
        assert chat.create(**CHAT, extra_body=fields).choices[0].message.content == plain
    plain = completion.create(**COMPLETION).choices[0].text
    extra = NOTHING | NOTHING_IN_A_COMPLETION
    for fields in (extra, dict.fromkeys(extra)):
        assert completion.create(**COMPLETION, extra_body=fields).choices[0].text == plain


@pytest.mark.parametrize(
    "field",
    [
        {"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"logit_bias": {"5": 1}}, {"ignore_eos": True},
        {"stop_token_ids": [5]}, {"min_tokens": 1}, {"best_of": 2}, {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function"}]}, {"tool_choice": "required"}, {"modalities": ["audio"]},
        {"verbosity": "low"}, {"reasoning_effort": "high"}, {"store": True}, {"prediction": {"type": "content"}},
        {"audio": {"voice": "x"}}, {"web_search_options": {}}, {"guided_json": {}}, {"continue_final_message": True},
        {"mirostat": 2}, {"presence_penalty": False}, {"a field of tomorrow": 1},
    ],
    ids=lambda field: next(iter(field)),
)  # fmt: skip
def test_a_field_that_would_change_the_answer_is_refused_by_its_name(served, field):
    (name,) = field
    error = assert_refused(served, "/v1/chat/completions", CHAT | field, 400, f"{name}")
    assert error["param"] == name and "is not supported here" in error["message"]


@pytest.mark.parametrize(
    "field, reported",
    [
        ({"max_token": 5}, "max_token: is not supported here; did you mean max_tokens?"),
        ({"temperature": "1"}, 'temperature="1": must be a number'),
        ({"temperature": True}, "temperature=true: must be a number"),
        ({"temperature": 10**400}, "must be a number"),
        ({"top_k": 10**30}, "must be a whole number from -1 to 2147483647"),
        ({"n": 1.5}, "n=1.5: must be a whole number from 1 to 64"),
        ({"stream": "yes"}, 'stream="yes": must be true or false'),
        ({"stream_options": {"include_use": True}}, "stream_options.include_use: is not supported here; did you mean"),
        ({"stop": [1]}, "stop=[1]: must be text, or a list of texts"),
        ({"stop": ["x" * 1001]}, "must be at most 16 texts of at most 1,000 characters"),
        ({"seed": 2**63}, "seed=9223372036854775808: must be a whole number"),
        ({"prompt": [True]}, "prompt=[true]: must be text, ids of tokens, or a list of one of them"),
        ({"prompt": [[1], 5]}, "must be text, ids of tokens"),
        ({"prompt": {"a": 1}}, "must be text, ids of tokens"),
        ({"model": 5}, "model=5: must be text"),
        ({"model": None}, "model: is missing"),
    ],
)
def test_a_wrong_value_is_reported_with_its_field_and_what_is_valid(served, field, reported):
    error = assert_refused(served, "/v1/completions", COMPLETION | field, 400, reported)
    assert error["param"].startswith(next(iter(field)))


@pytest.mark.parametrize(
    "message, reported",
    [
        ({"role": "assistant", "content": "x", "prefix": True}, "messages.1.prefix=true: is not supported here"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "messages.1.tool_calls=[{"),
        ({"role": "assistant", "content": "x", "reasoning_content": "hm"}, 'messages.1.reasoning_content="hm": is not'),
        ({"role": "assistant", "content": "x", "function_call": {}}, "messages.1.function_call: is not supported here"),
        ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, "messages.1.audio: is not supported here"),
        ({"role": "user", "content": "x", "name": "Ann"}, 'messages.1.name="Ann": is not supported here'),
        ({"role": "user", "content": "x", "of tomorrow": 0}, "messages.1.of tomorrow: is not supported here"),
        ({"role": "assistant", "content": None}, "messages.1.content: is missing"),
        ({"role": "user"}, "messages.1.content: is missing"),
        ({"content": "x"}, "messages.1.role: is missing"),
        (
            {"role": "tool", "content": "x", "tool_call_id": "1"},
            'messages.1.role="tool": must be system, user',
        ),
        ({"role": ["user"], "content": "x"}, 'messages.1.role=["user"]: must be'),
        ("hello", 'messages.1="hello": must be a JSON object'),
        ({"role": "user", "content": 5}, "messages.1.content=5: must be text, or a list of parts of type text"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            'messages.1.content.0.type="image_url": is not supported here; leave it out, or give "text"',
        ),
        ({"role": "user", "content": [{"type": "text", "text": "x", "bold": 1}]}, "messages.1.content.0.bold: is not"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.1.content.0.text: is missing"),
        ({"role": "system", "content": "x"}, "role=system: must be the first message"),
    ],
)
def test_what_a_message_holds_is_honored_or_refused_as_outside(served, message, reported):
    assert_refused(served, "/v1/chat/completions", CHAT | {"messages": [*HELLO, message]}, 400, reported)


def test_messages_of_text_are_understood_in_every_form(served, tokenizer):
    """Parts, OpenAI's newer role, what an answer of theirs holds in addition to its text, and nulls."""
    talk = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "q", "cache_control": {}}],
            "name": None,
        },
        {"role": "assistant", "content": "", "refusal": None, "annotations": [], "audio": None, "tool_calls": None},
        {"role": "user", "content": "r", "prefix": False, "tool_calls": []},
    ]
    ids = chat_prompt(tokenizer, [("system", "be brief"), ("user", "q"), ("assistant", ""), ("user", "r")])
    answer = served.client.chat.completions.create(**CHAT | {"messages": talk})
    assert answer.usage.prompt_tokens == len(ids)
    same = served.client.completions.create(**COMPLETION | {"prompt": ids})
    assert answer.choices[0].message.content == same.choices[0].text


def test_models_are_found_by_name_and_every_path_answers_head(served):
    assert served.client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="model 'other/one': there is only 'small'") as error:
        served.client.models.retrieve("other/one")
    assert error.value.code == "model_not_found"
    for path in ("/health", "/v1/models", "/v1/models/small"):
        status, headers, body = served.ask("HEAD", path)
        assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    "method, path, data, status, reported",
    [
        ("GET", "/", None, 404, "GET /: no such path; there are /health, /v1/models, "),
        ("POST", "/v1/embeddings", b"{}", 404, "POST /v1/embeddings: no such path"),
        ("GET", "/v1/models/", None, 404, "model ''"),
        ("GET", "/v1/completions", None, 405, "GET /v1/completions: the path takes POST"),
        ("DELETE", "/v1/models/small", None, 405, "DELETE /v1/models/small: the path takes GET"),
        ("POST", "/v1/completions", b"", 400, "the body is not valid JSON"),
        ("POST", "/v1/completions", b'{"model": ', 400, "the body is not valid JSON"),
        ("POST", "/v1/completions", b'{"model": "\xff"}', 400, "the body is not valid JSON"),
        ("POST", "/v1/completions", b"[" * 200_000, 400, "the body is not valid JSON"),
        ("POST", "/v1/completions", b'{"seed": ' + b"9" * 5000 + b"}", 400, "the body is not valid JSON"),
        ("POST", "/v1/completions", b"[]", 400, "the body=[]: must be a JSON object"),
        (
            "POST",
            "/v1/completions",
            b" " * 8_000_001,
            413,
            "the request has 8,000,001 bytes; the server takes",
        ),
    ],
)
def test_every_error_has_openais_form(served, method, path, data, status, reported):
    got, headers, answer = served.ask(method, path, data)
    error = json.loads(answer)["error"]
    assert got == status and reported in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    if status == 405:
        assert "GET" in headers["Allow"] or "POST" in headers["Allow"]


def test_another_content_type_is_refused_and_an_error_of_ours_has_the_form_too(served, monkeypatch):
    status, _, answer = served.ask("POST", "/v1/completions", b"{}", Content_Type="text/plain")
    assert status == 415 and "text/plain: must be application/json" in json.loads(answer)["error"]["message"]
    monkeypatch.setattr(served.engine, "check_count", lambda *_: 1 / 0)
    assert assert_refused(served, "/v1/completions", COMPLETION, 500, "the server failed")["type"] == "server_error"


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(served, tokenizer, monkeypatch):
    """Its size alone decides: no token stands for more bytes than the longest one."""
    longest = max(len(tokenizer.bytes_of(token)) for token in range(tokenizer.vocab_size))
    fits, never = "a" * (longest * 511), "a" * (longest * 511 + 1)  # with the begin token, of 512
    assert_refused(served, "/v1/completions", COMPLETION | {"prompt": fits}, 400, " tokens is longer than the context")
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("tokenized"))
    for text in (never, "x " * 3_500_000):
        error = assert_refused(served, "/v1/completions", COMPLETION | {"prompt": text}, 400, " of text are at least ")
        assert error["code"] == "context_length_exceeded"
        body = CHAT | {"messages": [{"role": "user", "content": text}]}
        assert_refused(served, "/v1/chat/completions", body, 400, "messages: ")
    many = CHAT | {"messages": [{"role": "user", "content": ""}] * 600}
    assert_refused(served, "/v1/chat/completions", many, 400, "messages: 0 bytes of text are at least 600 tokens")
    assert_refused(
        served, "/v1/completions", COMPLETION | {"prompt": ["a"] * 10**5}, 400, "100000 texts in one request"
    )
    assert_refused(served, "/v1/completions", COMPLETION | {"prompt": "x" * 10_000_000}, 413, "the request has 10,000,")


def test_others_are_answered_while_a_long_prompt_is_tokenized(served, monkeypatch):
    """Tokenization waits here until /health has answered: in the event loop it would wait for ever."""
    answered, where, encode = threading.Event(), [], Tokenizer.encode

    def slow(tokenizer, text):
        where.append(threading.current_thread())
        assert answered.wait(60)
        return encode(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    results = []

    def ask() -> None:
        results.append(served.client.completions.create(**COMPLETION))
        results.append(served.client.chat.completions.create(**CHAT))

    client = threading.Thread(target=ask)
    client.start()
    with urllib.request.urlopen(f"{served.url}/health", timeout=60) as health:
        assert json.loads(health.read()).keys() == {"running", "waiting"}
    answered.set()
    client.join()
    assert len(results) == 2 and served.thread not in where and threading.main_thread() not in where


def test_any_text_is_answered_half_characters_too(served):
    """A client that cuts a text in the middle of an emoji: the half counts as U+FFFD, in prompts and stop strings."""
    half, whole = COMPLETION | {"prompt": "a\ud83d"}, COMPLETION | {"prompt": "a\ufffd"}
    status, _, answer = served.ask("POST", "/v1/completions", json.dumps(half).encode())
    same = served.ask("POST", "/v1/completions", json.dumps(whole).encode())[2]
    assert status == 200 and json.loads(answer)["choices"] == json.loads(same)["choices"]
    raw = json.dumps(half, ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert json.loads(served.ask("POST", "/v1/completions", raw)[2])["choices"] == json.loads(same)["choices"]
    talk = CHAT | {"messages": [{"role": "user", "content": "\udc4d\ud83d"}], "stop": ["\ud83d", ""], "stream": True}
    status, _, events = served.ask("POST", "/v1/chat/completions", json.dumps(talk).encode())
    assert status == 200 and events.endswith(b"data: [DONE]\n\n")
    for field in ({"model": "\ud83d"}, {"user": "\ud83d", "\ud83d": 1}, {"temperature": "\ud83d"}):
        status, _, answer = served.ask("POST", "/v1/completions", json.dumps(COMPLETION | field).encode())
        assert status in (400, 404) and json.loads(answer)["error"]["message"]


def test_the_name_of_a_folder_that_is_no_text_reaches_the_client(model, tokenizer):
    engine = serving.Engine(model, tokenizer, 1, 1, 60.0)
    try:
        service = serving.Service(engine, tokenizer, "x\udce9", 1000)
        assert json.loads(serving.Json(service.model()).body)["id"] == "x\udce9"
    finally:
        engine.close()


def test_control_tokens_in_a_prompt_count_where_the_client_says_so(served, tokenizer):
    """For models with a chat format of their own; transformers finds the same ids in the same text."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(tokenizer.serialized).backend)
    theirs.backend_tokenizer.encode_special_tokens = False
    text = f"be brief{USER}日本 x{ASSISTANT}"
    ids = [tokenizer.bos_id, *theirs.encode(text, add_special_tokens=False)]
    assert ids.count(tokenizer.backend.token_to_id(USER)) == 1
    wanted = served.client.completions.create(**COMPLETION | {"prompt": ids})
    for prompt in (text, BOS + text):
        answer = served.client.completions.create(**COMPLETION | {"prompt": prompt}, extra_body={"parse_special": True})
        assert answer.usage == wanted.usage and answer.choices[0].text == wanted.choices[0].text
    plain = served.client.completions.create(**COMPLETION | {"prompt": text})
    assert plain.usage.prompt_tokens > wanted.usage.prompt_tokens + 4


def test_a_key_is_asked_for_and_origins_are_named(model, tokenizer):
    here = "http://localhost:3000"
    guarded = Served(model, tokenizer, key="secret", origins=(here,))
    try:
        for key in ("none", "", "secret2"):
            status, headers, answer = guarded.ask("GET", "/v1/models", Authorization=f"Bearer {key}", Origin=here)
            assert status == 401 and json.loads(answer)["error"]["code"] == "invalid_api_key"
            assert headers["Access-Control-Allow-Origin"] == here  # so that the page can read why
        assert guarded.ask("GET", "/v1/models")[0] == 401 and guarded.ask("GET", "/nowhere")[0] == 401
        assert guarded.ask("GET", "/health")[0] == 200
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="secret", max_retries=0)
        assert client.completions.create(**COMPLETION).choices
        asked = {
            "Access_Control_Request_Method": "POST",
            "Access_Control_Request_Headers": "x-stainless-os",
        }
        status, headers, _ = guarded.ask("OPTIONS", "/v1/completions", Origin=here, **asked)
        assert status == 200 and headers["Access-Control-Allow-Origin"] == here
        assert "x-stainless-os" in headers["Access-Control-Allow-Headers"]
        status, headers, _ = guarded.ask("OPTIONS", "/v1/completions", Origin="http://evil.example", **asked)
        assert status == 400 and headers["Access-Control-Allow-Origin"] is None
    finally:
        guarded.close()


def test_without_named_origins_no_page_is_let_in(served):
    status, headers, _ = served.ask("GET", "/v1/models", Origin="http://localhost:3000")
    assert status == 200 and not [name for name in headers if name.lower().startswith("access-control")]
