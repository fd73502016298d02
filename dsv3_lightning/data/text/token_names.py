"""Control tokens of a tokenizer.json and the files next to it: which they are, and which begin and end a text.

Imports no torch.
"""

import re
from pathlib import Path
from typing import Any

from dsv3_lightning.common.json_files import parse_object, read_json, shown
from dsv3_lightning.errors import ConfigError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"

# Added tokens that look like control tokens. V3 doesn't mark <think> and FIM as special, so text could contain them.
MARK = re.compile(r"<[^<>\s]+>|<[|｜].+[|｜]>|\[/?[A-Z][A-Z0-9_]*\]")
FILES_WITH_NAMES = ("tokenizer_config.json", "special_tokens_map.json")  # of control tokens
FILES_WITH_IDS = ("generation_config.json", "config.json")
OTHERS = ("tiktoken.model", "tokenizer.model", "vocab.json")  # tokenizers in formats that are not read


def parse(serialized: str) -> dict[str, Any]:
    """The content of a tokenizer.json. Raises ConfigError."""
    description = parse_object(serialized)
    if not isinstance(description.get("model"), dict):
        raise ConfigError("not a tokenizer.json: it has no model")
    return description


def added_tokens(description: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json. Raises ConfigError if the entry is malformed."""
    tokens = description.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise ConfigError(f"added_tokens={shown(tokens)}: must be a list of objects")
    for token in tokens:
        if not (isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"]):
            raise ConfigError(f"added_tokens: {shown(token)} must be an object with the token's text as content")
    return tokens


def is_control(token: dict[str, Any]) -> bool:
    """Whether an added token is a control token rather than text."""
    return bool(token.get("special")) or MARK.fullmatch(token["content"]) is not None


def absent(file: Path) -> str:
    """The message for a missing tokenizer.json, with what to do."""
    missing = f"{file}: No such file or directory"
    found = [name for name in OTHERS if file.with_name(name).is_file()]
    if found:
        missing += f", and {found[0]} next to it has another format"
    if (file.parent / "config.json").is_file():
        missing += "; set data.tokenizer to a tokenizer.json with this model's ids (docs/huggingface.md, Tokenizers)"
    return missing


def find_names(description: dict[str, Any], folder: Path) -> tuple[str, str, str]:
    """Names of the begin, end and padding tokens. Raises ConfigError if there is no end token.

    If no file names an end token, ids in generation_config.json or config.json are used.
    """
    vocabulary = description["model"].get("vocab")
    added = added_tokens(description)
    known = {token["content"] for token in added} | set(vocabulary if isinstance(vocabulary, dict) else ())
    bos, eos, pad = (
        [name for file in existing(folder, FILES_WITH_NAMES) for name in token_name(read_json(file), role, file)]
        for role in ("bos_token", "eos_token", "pad_token")
    )
    if not known & {*eos, EOS}:
        ids = [index for file in existing(folder, FILES_WITH_IDS) for index in id_list(read_json(file), file)]
        eos = [token["content"] for index in ids for token in added if token.get("id") == index]
    end = next((name for name in (*eos, EOS) if name in known), None)
    if end is None:
        where = "an eos_token in a tokenizer_config.json next to it, nor an eos_token_id in a config.json"
        raise ConfigError(f"no end token: neither {EOS} nor {where}")
    begin, padding = (next(name for name in found if name in known) for found in ((BOS, *bos, end), (PAD, *pad, end)))
    return begin, end, padding


def existing(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def token_name(content: dict[str, Any], role: str, file: Path) -> list[str]:
    """The name in a field that holds text or an object; none for null. Raises ConfigError."""
    given = content.get(role)
    name = given.get("content") if isinstance(given, dict) else given
    if not isinstance(name, str | None):
        raise ConfigError(f"{file}: {role}={shown(given)}: must be text, or an object with the token's text as content")
    return [] if name is None else [name]


def id_list(content: dict[str, Any], file: Path) -> list[int]:
    """The end tokens in eos_token_id: one id, or a list of them; none for null. Raises ConfigError."""
    given = content.get("eos_token_id")
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(index) is int or type(index) is float and index.is_integer() for index in ids):
        raise ConfigError(f"{file}: eos_token_id={shown(given)}: must be a whole number, or a list of them")
    return [int(index) for index in ids]


def end_ids(folder: Path) -> set[int]:
    """The end tokens in the folder's JSON files: instruct models often also have an end of turn."""
    return {index for file in existing(folder, FILES_WITH_IDS) for index in id_list(read_json(file), file)}
