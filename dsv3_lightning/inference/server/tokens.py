"""The endpoints /tokenize, /detokenize and /tokenizer_info, as vLLM's clients use them."""

from typing import Any

from dsv3_lightning.data.text.conversation import CHAT_TEMPLATE
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.inference.server.handlers import Handler, flag, text, token_ids
from dsv3_lightning.inference.text import encode, encode_with_marks

TOKENIZE: dict[str, Handler] = {
    "model": text,
    "prompt": text,
    "add_special_tokens": flag,
    "parse_special": flag,
    "return_token_strs": flag,
}
DETOKENIZE: dict[str, Handler] = {"model": text, "tokens": token_ids}


def tokenize(tokenizer: Tokenizer, fields: dict[str, Any], limit: int) -> dict[str, Any]:
    """Token ids of a text, with the begin token unless add_special_tokens is false.

    Text never becomes a control token, but a prompt that is nothing but the name of one is that token, since clients
    look up the end token's id so. With parse_special every such name is its token.
    """
    prompt = fields["prompt"]
    marked = fields.get("parse_special", False) or prompt in tokenizer.added.values()
    ids = encode_with_marks(tokenizer, prompt) if marked else encode(tokenizer, prompt)
    if fields.get("add_special_tokens", True) and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    names = [tokenizer.decode([token]) for token in ids] if fields.get("return_token_strs") else None
    return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": names}


def tokenizer_info(tokenizer: Tokenizer, limit: int) -> dict[str, Any]:
    """What transformers' tokenizer_config.json of the model would hold."""
    bos, eos, pad = tokenizer.names
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "model_max_length": limit,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template or CHAT_TEMPLATE,
    }
