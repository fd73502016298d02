"""Parsing of conversations: the messages of a line of data and which of them are trained on. Imports no torch.

Fields that select what is trained on are honored or refused, content that the format can't represent is refused, and
all other fields are counted as unread, so that nothing is dropped silently.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsv3_lightning.common.json_files import shown
from dsv3_lightning.data.text.conversation import ROLES, Message, check_role
from dsv3_lightning.errors import ConfigError

# Fields of a message or a line that say whether it is trained on: 0, 1, true or false.
MARKS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight")
DECIDES = frozenset("mask masks masked weight weights loss train training trainable learn learned".split())
# Words in the names of fields whose content DeepSeek's plain chat format can't represent.
TOOLS = frozenset("tool tools function functions".split())
MEDIA = frozenset("image images audio audios video videos".split())
IN_MESSAGES = TOOLS | MEDIA | frozenset("reasoning thinking thought media file files prefix refusal name".split())
IN_LINES = TOOLS | MEDIA
SYSTEM = ("system", "system_prompt")  # fields of a line that hold the system text, as ShareGPT's files have it
NEUTRAL: tuple[Any, ...] = (None, False, "", [], {}, "[]", "{}", "none", "auto")
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MEANT = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
TYPES = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number", str: "text"}


def parse(record: Mapping[str, Any], key: str, unread: Counter[str]) -> list[Message]:
    """The messages under `key` of a line of data, each with role, text and whether it is trained on.

    unread: counts the fields without a meaning for training. Raises ConfigError with the field's name.
    """
    messages = record[key]
    if not messages:
        raise ConfigError(f"{key}=[]: must hold messages, such as {{role: user, content: …}}")
    rest = {name: value for name, value in record.items() if name != key and name not in SYSTEM}
    line_is_learned = all(read_fields(rest, IN_LINES, "", unread))
    found = [parse_message(message, number, f"{key}[{number}]", unread) for number, message in enumerate(messages)]
    found = with_system(found, record)
    if all(message.role != "assistant" for message in found):
        raise ConfigError(f"{key}: has no message of the assistant, so there is nothing to learn")
    return [message._replace(learned=message.learned and line_is_learned) for message in found]


def parse_message(message: Any, number: int, where: str, unread: Counter[str]) -> Message:
    if isinstance(message, dict) and {"role", "content"} <= message.keys():
        role, content, field = message["role"], message["content"], "content"
        if isinstance(role, str) and (meant := MEANT.get(role.lower(), role.lower())) != role and meant in ROLES:
            raise ConfigError(f"{where}.role={role}: must be system, user or assistant; {meant} is probably meant")
    elif isinstance(message, dict) and {"from", "value"} <= message.keys():  # ShareGPT's names
        role, content, field = message["from"], message["value"], "value"
        if not isinstance(role, str) or role not in SHAREGPT:
            raise ConfigError(f"{where}.from={shown(role)}: must be human, gpt or system")
        role = SHAREGPT[role]
    else:
        raise ConfigError(f"{where}: must have a role and a content")
    check_role(role, number, f"{where}.role")
    rest = {name: value for name, value in message.items() if name not in ("role", "content", "from", "value")}
    marks = read_fields(rest, IN_MESSAGES, f"{where}.", unread)
    if role != "assistant" and any(marks):
        raise ConfigError(f"{where}: a mark says that a message of the {role} is learned; only the assistant's can be")
    return Message(role, text_of(content, f"{where}.{field}"), role == "assistant" and all(marks))


def read_fields(fields: Mapping[str, Any], impossible: frozenset[str], where: str, unread: Counter[str]) -> list[bool]:
    """Values of the fields that say what is trained on. Raises ConfigError for those that can't be honored."""
    marks = []
    for name, value in fields.items():
        words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)}
        if words & DECIDES:
            if value is None:
                continue
            if name not in MARKS or not isinstance(value, int | float) or value not in (0, 1):
                raise ConfigError(
                    f"{where}{name}={shown(value)}: seems to mark what is learned; valid marks are "
                    f"{', '.join(MARKS)}, each 0, 1, true or false"
                )
            marks.append(bool(value))
        elif words & impossible:
            if value not in NEUTRAL:
                raise ConfigError(f"{where}{name}={shown(value)}: has no place in the format of conversations here")
        else:
            unread[name] += 1
    return marks


def text_of(content: Any, where: str) -> str:
    """The text of a content: a string, or text parts joined. Raises ConfigError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{where}: must be text, is {'null' if content is None else TYPES[type(content)]}")
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ConfigError(f"{where}[{number}]={shown(part)}: must be {{type: text, text: …}}; only text is learned")
    return "".join(part["text"] for part in content)


def with_system(messages: list[Message], record: Mapping[str, Any]) -> list[Message]:
    """The messages, preceded by the line's system text if it has one. Raises ConfigError if there are two."""
    for name in SYSTEM:
        text = record.get(name)
        if text in NEUTRAL:
            continue
        if not isinstance(text, str):
            raise ConfigError(f"{name}: must be text, is {TYPES[type(text)]}")
        if messages[0].role == "system":
            raise ConfigError(f"{name}={shown(text)}: the messages also have a system text")
        messages = [Message("system", text, False), *messages]
    return messages


def holds_messages(text: str) -> bool:
    """Whether a text is JSON with a conversation, which would be trained on as raw JSON."""
    if not text.lstrip().startswith(("[", "{")) or not ('"role"' in text or '"from"' in text):
        return False
    try:
        return is_conversation(json.loads(text))
    except (ValueError, RecursionError):
        return False


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, an object with one, or a list of such objects."""
    if isinstance(value, dict):
        return any(is_conversation(inside) for inside in value.values() if isinstance(inside, list))
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    keys = [item.keys() for item in value]
    return all({"role", "content"} <= names or {"from", "value"} <= names for names in keys) or all(
        is_conversation(item) for item in value
    )
