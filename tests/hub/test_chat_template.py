"""transformers writes a conversation as we do: the template of an export gives our ids, and both stop at one token."""

import json

import pytest

from dsv3_lightning.data.text.conversation import conversation
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.hub.tokens import write_tokenizer
from dsv3_lightning.inference.chat import chat_prompt

WORDS = ["def f(x): return x  # 数据 🙂\n", "Hello, who are you? I am a model, and brief."] * 9
TALKS = {
    "one question": [("user", "who are you?")],
    "answered": [("user", "who?"), ("assistant", "a model")],
    "with a system": [("system", "Be brief. "), ("user", "who?"), ("assistant", "a model"), ("user", "and now?")],
    "system alone": [("system", "Be brief.")],
    "spaces and lines": [("user", "  a\n\n"), ("assistant", "\n b \r\n"), ("user", " "), ("assistant", "\t")],
    "unicode": [("user", "数据 naïve e\u0301"), ("assistant", "🙂 \U0001f469\u200d\U0001f680"), ("user", "かな 12345")],
    "nothing said": [("system", ""), ("user", ""), ("assistant", ""), ("user", "{{ bos_token }} {% if %}")],
    "out of turn": [("assistant", "hello"), ("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")],
}


@pytest.fixture(scope="module", params=[None, "<|EOT|>"])
def both(request, tmp_path_factory):
    """Ours and theirs, with V3's end token and with another."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(Tokenizer.train(WORDS, 400).ending_with(request.param), folder, 128)
    return Tokenizer.from_file(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TALKS)
def test_the_template_gives_our_ids(both, name):
    ours, theirs = both
    messages = [{"role": role, "content": text} for role, text in TALKS[name]]
    for asked in (False, True):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=asked, return_dict=False)
        written = conversation(ours, [(role, ours.encode(text)) for role, text in TALKS[name]]).ids
        assert ids == (chat_prompt(ours, TALKS[name]) if asked else written)


def test_the_template_refuses_what_we_refuse(both):
    for messages in ([("tool", "x")], [("user", "q"), ("system", "s")], [("system", "s"), ("system", "t")]):
        with pytest.raises(Exception, match="must be user or assistant, or system and first"):
            both[1].apply_chat_template([{"role": role, "content": text} for role, text in messages])


def test_a_tokenizer_without_the_marks_has_no_template(tmp_path):
    tokenizer = Tokenizer.train(WORDS, 400)
    renamed = tokenizer.serialized.replace("<｜Assistant｜>", "<｜Nobody｜>")
    write_tokenizer(Tokenizer(renamed), tmp_path, 128)
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
