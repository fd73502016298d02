"""Conversations in DeepSeek's format: begin, system text, then <｜User｜>…<｜Assistant｜>…end for every turn. No torch.

This is the only definition of the format; training data, `dsv3 chat`, the server and exports use it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dsv3_lightning.data.text.tokenizer import ASSISTANT, USER, Tokenizer
from dsv3_lightning.errors import ConfigError

ROLES = ("system", "user", "assistant")
# The same for transformers' `apply_chat_template` and for engines that read its templates.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}{{ message['content'] }}"
    f"{{% elif message['role'] == 'user' %}}{{{{ '{USER}' + message['content'] }}}}"
    f"{{% elif message['role'] == 'assistant' %}}{{{{ '{ASSISTANT}' + message['content'] + eos_token }}}}"
    "{% else %}{{ raise_exception('role=' + message['role'] + ': must be user or assistant, or system and first') }}"
    f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)


class Message(NamedTuple):
    """A message. learned: whether it is trained on, which only an assistant's message can be."""

    role: str
    text: str
    learned: bool


class Written(NamedTuple):
    """A tokenized conversation. ids: from the begin token to the last message.

    assistant_spans: (begin, end) of the assistant's texts in the ids, end token included.
    """

    ids: list[int]
    assistant_spans: list[tuple[int, int]]


def check_role(role: object, number: int, name: str) -> None:
    if role not in ROLES:
        raise ConfigError(f"{name}={role}: must be system, user or assistant")
    if role == "system" and number:
        raise ConfigError(f"{name}=system: must be the first message, and the only one of that role")


def conversation(tokenizer: Tokenizer, messages: Iterable[tuple[str, Sequence[int]]]) -> Written:
    """Tokenizes a conversation. messages: role, and ids of the text alone. Raises ConfigError."""
    written = Written([tokenizer.bos_id], [])
    for number, (role, words) in enumerate(messages):
        check_role(role, number, "role")
        ids = turn(tokenizer, role, words)
        begin = len(written.ids)
        written.ids.extend(ids)
        if role == "assistant":
            written.assistant_spans.append((begin + 1, len(written.ids)))  # all but its mark
    return written


def turn(tokenizer: Tokenizer, role: str, words: Sequence[int]) -> list[int]:
    """Ids of one message with its role tokens. Raises ConfigError if the tokenizer has none."""
    user, assistant = turn_ids(tokenizer)
    if role == "assistant":
        return [assistant, *words, tokenizer.eos_id]
    return [user, *words] if role == "user" else [*words]


def turn_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Ids of the two role tokens. Raises ConfigError if the tokenizer has none or the model's format is different."""
    if (tokenizer.chat_template or CHAT_TEMPLATE).rstrip("\n") != CHAT_TEMPLATE:
        raise ConfigError(
            "the model's chat_template is not the one that conversations are written with here (DeepSeek's marks), so "
            "the prompt would be a wrong one; write the whole prompt yourself, with its control tokens, and give it to "
            'dsv3 generate --parse-special, or to /v1/completions with "parse_special": true'
        )
    user, assistant = (tokenizer.backend.token_to_id(name) for name in (USER, ASSISTANT))
    if user is None or assistant is None:
        raise ConfigError(f"the tokenizer has no {USER} and {ASSISTANT}, which a chat is written with")
    return user, assistant
