"""Log-probabilities in the formats of OpenAI's completions and chats, which evaluation harnesses read, too.

A token that is not whole characters is written as `bytes:\\xe6\\x97`, so that different tokens have different names.
"""

from typing import Any

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.inference.likely import TokenScore


def of_completion(tokenizer: Tokenizer, scores: list[TokenScore]) -> dict[str, list[Any]]:
    """Lists by token. top_logprobs: by the most likely tokens' names, and the token's own, with the same number as in
    token_logprobs: it equals the largest one where greedy decoding would write the token. Null where there is none."""
    top: list[dict[str, float] | None] = []
    for score in scores:
        if score.log_p is None:
            top.append(None)
            continue
        named: dict[str, float] = {}
        for token, log_p in [*score.top, (score.token, score.log_p)]:
            named.setdefault(name_of(tokenizer, token), log_p)
        top.append(named)
    return {
        "tokens": [name_of(tokenizer, score.token) for score in scores],
        "token_logprobs": [score.log_p for score in scores],
        "top_logprobs": top,
        "text_offset": [score.offset for score in scores],
    }


def of_chat(tokenizer: Tokenizer, scores: list[TokenScore]) -> dict[str, Any]:
    """One entry per token of the answer's text; its end token is not part of it."""
    written = [score for score in scores if score.token not in tokenizer.end_ids]
    return {
        "content": [
            entry(tokenizer, score.token, score.log_p)
            | {"top_logprobs": [entry(tokenizer, token, log_p) for token, log_p in score.top]}
            for score in written
        ],
        "refusal": None,
    }


def entry(tokenizer: Tokenizer, token: int, log_p: float | None) -> dict[str, Any]:
    return {"token": name_of(tokenizer, token), "logprob": log_p, "bytes": list(tokenizer.bytes_of(token))}


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """The token's text, or the escaped bytes of one that is a part of a character."""
    raw = tokenizer.bytes_of(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
