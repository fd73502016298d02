"""Tokenizer files, the chat template and generation_config.json, with the same special tokens in all of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.json_files import read_json, read_text
from dsv3_lightning.data.text.conversation import CHAT_TEMPLATE
from dsv3_lightning.data.text.token_names import end_ids
from dsv3_lightning.data.text.tokenizer import ASSISTANT, USER, Tokenizer
from dsv3_lightning.errors import ConfigError


def token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes the files that AutoTokenizer reads. It adds the begin token, as every document in training has it.

    If the tokenizer has the chat tokens, `apply_chat_template` formats conversations as we do.
    """
    tokenizer.save(folder)
    description = json.loads(tokenizer.serialized)
    bos = tokenizer.names[0]
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }
    write_json(folder / "tokenizer.json", description)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"model_max_length": max_length}
    if None not in [tokenizer.backend.token_to_id(mark) for mark in (USER, ASSISTANT)]:
        config["chat_template"] = CHAT_TEMPLATE
    write_json(folder / "tokenizer_config.json", config)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, with its end tokens and chat template. Raises ConfigError."""
    tokenizer = Tokenizer.from_file(folder)
    tokenizer.end_ids |= end_ids(folder)
    tokenizer.chat_template = chat_template(folder)
    return tokenizer


def chat_template(folder: Path) -> str | None:
    """The folder's chat template, if any: the separate file or else the tokenizer's field, as in transformers."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    file = folder / "tokenizer_config.json"
    given: Any = read_json(file).get("chat_template") if file.is_file() else None
    return given if given is None or isinstance(given, str) else json.dumps(given)  # several templates by name


def vocabulary_note(tokenizer: Tokenizer, rows: int, where: str | Path) -> str | None:
    """A note if the model has more rows than the tokenizer has ids. Raises ConfigError if it has fewer."""
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"{where}: the tokenizer's ids go up to {tokenizer.vocab_size - 1:,}, and the model has "
            f"vocab_size={rows:,} rows; it needs at least {tokenizer.vocab_size:,}"
        )
    if len(tokenizer.ids) == rows:
        return None
    return f"{where}: {len(tokenizer.ids):,} of the model's {rows:,} ids have a token; the others are never drawn"


def write_generation_config(tokenizer: Tokenizer, folder: Path, unused: Sequence[int] = ()) -> None:
    """Writes the end tokens, without which transformers would not stop, and the unused ids that it must not draw."""
    suppressed = {"suppress_tokens": list(unused)} if unused else {}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **token_ids(tokenizer), **suppressed})


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
