"""Tables of all request fields, and the parsed request.

Unsupported fields are listed with the values that change nothing, since clients send their defaults: OpenAI's schema,
then the extensions of vLLM, SGLang, llama.cpp and others. To support a field, add a handler and an entry of `Wanted`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_lightning.data.text.conversation import ROLES
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.server.handlers import (
    Handler,
    anything,
    flag,
    is_token,
    number,
    only,
    read_fields,
    record,
    stop_strings,
    text,
    whole,
    wrong,
)
from dsv3_lightning.inference.server.refusals import Refused

TOKENS = whole(0, 2**53)
MOST_LIKELY = 20  # OpenAI's limit for chats, and vLLM's
STREAM_OPTIONS: dict[str, Handler] = {
    "include_usage": flag,
    "include_obfuscation": anything,
    "continuous_usage_stats": only(False),
}
COMMON: dict[str, Handler] = {
    "model": text,
    "max_tokens": TOKENS,
    "temperature": number,
    "top_p": number,
    "top_k": whole(-1, 2**31 - 1),
    "min_p": number,
    "n": whole(1, 64),
    "stop": stop_strings,
    "seed": whole(-(2**63), 2**63 - 1),
    "stream": flag,
    "stream_options": record(STREAM_OPTIONS),
    # OpenAI
    "presence_penalty": only(0),
    "frequency_penalty": only(0),
    "logit_bias": only({}),
    "user": anything,
    "metadata": anything,
    "service_tier": anything,
    "safety_identifier": anything,
    "prompt_cache_key": anything,
    "prompt_cache_options": anything,
    "prompt_cache_retention": anything,
    "response_format": only({"type": "text"}),
    "store": only(False),
    # vLLM, SGLang
    "best_of": only(1),
    "use_beam_search": only(False),
    "length_penalty": only(1),
    "early_stopping": only(False),
    "repetition_penalty": only(1),
    "ignore_eos": only(False),
    "min_tokens": only(0),
    "stop_token_ids": only([]),
    "bad_words": only([]),
    "allowed_token_ids": only([]),
    "include_stop_str_in_output": only(False),
    "no_stop_trim": only(False),
    "skip_special_tokens": only(True),
    "spaces_between_special_tokens": only(True, False),
    "return_tokens_as_token_ids": only(False),
    "return_token_ids": only(False),
    "return_hidden_states": only(False),
    "logits_processors": only([]),
    "vllm_xargs": only({}),
    "priority": anything,
    "request_id": anything,
    "rid": anything,
    "cache_salt": anything,
    # llama.cpp
    "n_predict": only(-1),
    "n_probs": only(0),
    "n_keep": only(0),
    "min_keep": only(0),
    "ignore_eog": only(False),
    "repeat_penalty": only(1),
    "repeat_last_n": only(64, 0, -1),
    "dry_multiplier": only(0),
    "dynatemp_range": only(0),
    "dynatemp_exponent": only(1),
    "mirostat": only(0),
    "mirostat_tau": only(5),
    "mirostat_eta": only(0.1),
    "tfs_z": only(1),
    "typical_p": only(1),
    "typ_p": only(1),
    "top_n_sigma": only(-1, 0),
    "top_a": only(0),
    "xtc_probability": only(0),
    "xtc_threshold": only(0.1),
    "grammar": only(""),
    "lora": only([]),
    "post_sampling_probs": only(False),
    "timings_per_token": only(False),
    "return_progress": only(False),
    "return_tokens": only(False),
    "cache_prompt": anything,
    "id_slot": anything,
    # Ollama, LM Studio, OpenRouter
    "keep_alive": anything,
    "ttl": anything,
    "options": only({}),
    "transforms": only([]),
}


def prompts(name: str, value: Any) -> list[str | list[int]]:
    """Handler for prompts: a text, a list of texts, the token ids of a prompt, or a list of such lists."""
    many = isinstance(value, list) and not (value and is_token(value[0]))
    given = value if many else [value]
    if not given:
        raise Refused(400, f"{name}: must not be an empty list", param=name)
    for prompt in given:
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(map(is_token, prompt))):
            raise wrong(name, value, "must be text, ids of tokens, or a list of one of them")
    return given


COMPLETION = COMMON | {
    "prompt": prompts,
    "parse_special": flag,
    "logprobs": whole(0, MOST_LIKELY),
    "suffix": only(""),
    "echo": flag,
    "add_special_tokens": only(True),
}
PART: dict[str, Handler] = {
    "type": only("text"),
    "text": text,
    "annotations": only([]),
    "cache_control": anything,
    "prompt_cache_breakpoint": anything,
}


def content(name: str, value: Any) -> str:
    """Handler for a message's content: text, or a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(name, value, "must be text, or a list of parts of type text")
    parts = (read_fields(part, PART, ("type", "text"), f"{name}.{place}.") for place, part in enumerate(value))
    return "".join(part["text"] for part in parts)


def role(name: str, value: Any) -> str:
    """Handler for roles of the chat format. `developer` is OpenAI's newer name for `system`."""
    spoken = "system" if value == "developer" else value
    if spoken not in ROLES:
        raise wrong(name, value, f"must be {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    return spoken


MESSAGE: dict[str, Handler] = {
    "role": role,  # first, so a tool message is refused for its role
    "content": content,
    # Fields of OpenAI's answers, which clients send back, with the values of an answer that is only text.
    "refusal": only(""),
    "annotations": only([]),
    "tool_calls": only([]),
    "reasoning": only(""),
    "reasoning_content": only(""),
    "reasoning_details": only([]),
    "images": only([]),
    "name": only(""),
    "prefix": only(False),
    "partial": only(False),
    "cache_control": anything,
}


def messages(name: str, value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise wrong(name, value, 'must be a list of messages, such as {"role": "user", "content": "…"}')
    read = []
    for place, message in enumerate(value):
        fields = read_fields(message, MESSAGE, ("role", "content"), f"{name}.{place}.")
        read.append((fields["role"], fields["content"]))
    return read


CHAT = COMMON | {
    "messages": messages,
    "max_completion_tokens": TOKENS,
    # OpenAI
    "logprobs": flag,
    "top_logprobs": whole(0, MOST_LIKELY),
    "modalities": only(["text"]),
    "tools": only([]),
    "tool_choice": only("none", "auto"),
    "parallel_tool_calls": only(True, False),
    "functions": only([]),
    "function_call": only("none", "auto"),
    "reasoning_effort": only("none", "medium"),  # the defaults of clients
    "verbosity": only("medium"),
    # vLLM, SGLang, DeepSeek, Ollama
    "echo": only(False),
    "add_generation_prompt": only(True),
    "continue_final_message": only(False),
    "add_special_tokens": only(False),
    "chat_template_kwargs": only({}),
    "documents": only([]),
    "include_reasoning": only(True, False),
    "separate_reasoning": only(True, False),
    "stream_reasoning": only(True, False),
    "thinking": only({"type": "disabled"}),
    "enable_thinking": only(False),
    "think": only(False),
}


@dataclass(frozen=True)
class Wanted:
    """The settings common to both kinds of requests. max_new_tokens: None for the default of the kind. top: the number
    of most likely tokens to list beside each token's log-probability, None for no log-probabilities."""

    model: str
    sampling: Sampling
    max_new_tokens: int | None
    copies: int
    stop: tuple[str, ...]
    seed: int | None
    stream: bool
    include_usage: bool
    top: int | None
    echo: bool


def wanted(fields: Mapping[str, Any]) -> Wanted:
    """The settings from the parsed fields. Raises ConfigError for values that Sampling refuses."""
    return Wanted(
        model=fields["model"],
        sampling=Sampling(
            temperature=fields.get("temperature", 1.0),
            top_k=max(fields.get("top_k", 0), 0),  # -1 means off in vLLM
            top_p=fields.get("top_p", 1.0),
            min_p=fields.get("min_p", 0.0),
        ),
        max_new_tokens=fields.get("max_completion_tokens", fields.get("max_tokens")),
        copies=fields.get("n", 1),
        stop=fields.get("stop", ()),
        seed=fields.get("seed"),
        stream=fields.get("stream", False),
        include_usage=fields.get("stream_options", {}).get("include_usage", False),
        top=most_likely(fields),
        echo=fields.get("echo") or False,
    )


def most_likely(fields: Mapping[str, Any]) -> int | None:
    """How many of the most likely tokens a request asks for; None for no log-probabilities.

    A completion has the number in `logprobs`, a chat in `top_logprobs` beside `logprobs: true`. Raises Refused.
    """
    asked = fields.get("logprobs")
    if "messages" not in fields:
        return asked
    if asked:
        return fields.get("top_logprobs", 0)
    if fields.get("top_logprobs"):
        raise Refused(400, f"top_logprobs={fields['top_logprobs']}: needs logprobs=true", param="top_logprobs")
    return None
