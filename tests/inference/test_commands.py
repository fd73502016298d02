"""`dsv3 generate` and `dsv3 chat` on a small model with a tokenizer of its own."""

import io
import socket

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.data.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.config import to_json
from dsv3_lightning.hub.export import reader, write_folder, write_weights
from dsv3_lightning.hub.tokens import token_ids, write_json, write_tokenizer
from dsv3_lightning.inference.chat import Chat, chat_prompt
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.sampling import Sampling
from tests.hub.folders import biased
from tests.model.small import small_config


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["def f(x):\n    return x\n", "日本語 and 👍 words"] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return biased(small_config(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1))


@pytest.fixture(scope="module")
def folder(tokenizer, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "out"

    def write(at):
        write_weights(model.config, reader(model.state_dict(), "memory"), at, torch.float32, 10**9)
        write_json(at / "config.json", to_json(model.config, token_ids(tokenizer), "float32"))
        write_tokenizer(tokenizer, at, 512)

    write_folder(out, write)
    return str(out)


def test_no_room_for_a_token_is_no_error_with_guesses_either(folder, capsys):
    for more in ([], ["--draft", "1"]):
        assert main(["generate", folder, "--prompt", "def ", "--max-new-tokens", "0", *more]) == 0
        shown = capsys.readouterr()
        assert shown.out == "def \n" and ("nothing was guessed" in shown.err) == bool(more)


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_less_than_no_token_is_refused(folder, verb, capsys):
    assert main([verb, folder, "--max-new-tokens", "-3", *(["--prompt", "a"] if verb == "generate" else [])]) == 2
    assert "a whole number from 0 on" in capsys.readouterr().err


def test_generate_streams_what_decoding_gives(folder, model, tokenizer, capsys):
    assert main(["generate", folder, "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "30"]) == 0
    (ids,) = decode(model, [[tokenizer.bos_id, *tokenizer.encode("def ")]], 30, Sampling(), {tokenizer.eos_id}, 0)
    assert capsys.readouterr().out == f"def {tokenizer.decode(ids)}\n"


def test_generate_stops_before_a_string(folder, capsys):
    arguments = ["generate", folder, "--prompt", "", "--temperature", "1", "--max-new-tokens", "40", "--seed", "4"]
    assert main(arguments) == 0
    whole = capsys.readouterr().out
    stop = whole[10:13]
    assert main([*arguments, "--stop", "never there", "--stop", stop]) == 0
    assert capsys.readouterr().out == whole[: whole.find(stop)] + "\n"


def test_guesses_leave_the_text_as_it_is_and_are_counted(folder, capsys):
    arguments = ["generate", folder, "--prompt", "def ", "--temperature", "0", "--max-new-tokens", "30"]
    assert main(arguments) == 0
    plain = capsys.readouterr().out
    assert main([*arguments, "--draft", "1"]) == 0
    out, error = capsys.readouterr()
    assert out == plain and "tokens per pass of the main model" in error
    assert main([*arguments, "--draft", "2"]) == 2
    assert "draft=2: must be between 1 and the model's MTP depth, 1" in capsys.readouterr().err


def test_several_prompts_are_shown_one_after_the_other(folder, capsys):
    arguments = ["generate", folder, "--temperature", "0", "--max-new-tokens", "12"]
    alone, together = [], list(arguments)
    for prompt in ("def ", "", "日本 " * 20):
        assert main([*arguments, "--prompt", prompt]) == 0
        alone.append(capsys.readouterr().out)
        together += ["--prompt", prompt]
    for more in ([], ["--draft", "1"]):
        assert main([*together, *more]) == 0
        assert capsys.readouterr().out == "---\n".join(alone)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seed", "-1"], "argument --seed: '-1' must be a whole number from 0 to 2^63 - 1"),
        (["--prompt", "\udcff"], "the text is no Unicode: its character 0 is a half one"),
        (["--temperature", "-1"], "temperature=-1.0: must be at least 0"),
        (["--top-p", "2"], "top_p=2.0: must be between 0 and 1"),
        (["--prompt", "x " * 600], "tokens is longer than the context of 512 tokens"),
    ],
)
def test_nonsense_is_one_line(words, message, folder, capsys):
    assert main(["generate", folder, "--prompt", "a", *words]) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and out == ""


def test_a_port_in_use_is_one_line(folder, capsys):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", folder, "--port", port]) == 2
    error = capsys.readouterr().err
    assert f"--host 127.0.0.1 --port {port}: " in error and error.count("\n") == 1


def test_a_chat_is_one_growing_conversation(folder, model, tokenizer, monkeypatch, capsys):
    """Each answer is what the whole conversation up to there gives, from the first token on."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nx = 日本\n"))
    options = ["--temperature", "0", "--max-new-tokens", "12", "--system", "be brief"]
    assert main(["chat", folder, *options]) == 0
    shown = capsys.readouterr().out
    talk, expected = [("system", "be brief")], ""
    ids = chat_prompt(tokenizer, [*talk, ("user", "hello")])
    for following in ("x = 日本", None):
        (new,) = decode(model, [ids], 12, Sampling(), {tokenizer.eos_id}, 0)
        expected += tokenizer.decode(new) + "\n"
        if following is not None:
            ids = [*ids, *new, tokenizer.eos_id, *chat_prompt(tokenizer, [("user", following)])[1:]]
    assert shown == expected


def test_a_chat_that_outgrows_the_context_says_so(model, tokenizer):
    chat = Chat(model, tokenizer, Sampling(), 0, "")
    "".join(chat.reply("a " * 100, 20))
    with pytest.raises(ConfigError, match="the conversation has .* tokens; the context holds 512"):
        "".join(chat.reply("a " * 400, 20))


def test_the_format_of_a_prompt(tokenizer):
    ids = chat_prompt(tokenizer, [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r")])
    text = tokenizer.decode(ids)
    assert text == "<｜begin▁of▁sentence｜>s<｜User｜>q<｜Assistant｜>a<｜end▁of▁sentence｜><｜User｜>r<｜Assistant｜>"
    with pytest.raises(ConfigError, match="role=tool: must be system, user or assistant"):
        chat_prompt(tokenizer, [("tool", "x")])
    for messages in ([("user", "q"), ("system", "s")], [("system", "s"), ("system", "t")]):
        with pytest.raises(ConfigError, match="role=system: must be the first message, and the only one of that role"):
            chat_prompt(tokenizer, messages)
