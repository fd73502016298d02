"""`dsv3 generate` and `dsv3 chat` on a small model with a tokenizer of its own."""

import io
import json
import queue
import shutil
import socket
from pathlib import Path

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.data.text.tokenizer import ASSISTANT, USER, Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.config import to_json
from dsv3_lightning.hub.export import write_folder, write_weights
from dsv3_lightning.hub.tokens import token_ids, write_json, write_tokenizer
from dsv3_lightning.inference.batching import Engine, Job
from dsv3_lightning.inference.chat import Chat, chat_prompt
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.runs.models import load
from tests.hub.folders import biased, in_memory
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
        write_weights(model.config, in_memory(model), at, torch.float32, 10**9)
        write_json(at / "config.json", to_json(model.config, token_ids(tokenizer), "float32"))
        write_tokenizer(tokenizer, at, 512)

    write_folder(out, write)
    return str(out)


def test_no_room_for_a_token_is_no_error_with_drafts_either(folder, capsys):
    for more in ([], ["--draft", "1"]):
        assert main(["generate", folder, "--prompt", "def ", "--max-new-tokens", "0", *more]) == 0
        shown = capsys.readouterr()
        assert shown.out == "def \n" and ("nothing was drafted" in shown.err) == bool(more)


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_less_than_no_token_is_refused(folder, verb, capsys):
    assert main([verb, folder, "--max-new-tokens", "-3", *(["--prompt", "a"] if verb == "generate" else [])]) == 2
    assert "a whole number of at least 0" in capsys.readouterr().err


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


def test_drafts_leave_the_text_as_it_is_and_are_counted(folder, capsys):
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


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_every_end_that_the_folder_names_ends_a_text(name, folder, model, tokenizer, tmp_path, monkeypatch, capsys):
    """generate, with drafts, chat, and the engine of serve: where transformers stops."""
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    asked = [[tokenizer.bos_id, *tokenizer.encode("def ")], chat_prompt(tokenizer, [("system", ""), ("user", "hi")])]
    texts = [decode(model, [ids], 12, Sampling(), set(), 0)[0] for ids in asked]
    ends = [ids[5] for ids in texts]
    content = json.loads((copied / name).read_text()) if (copied / name).exists() else {}
    write_json(copied / name, content | {"eos_token_id": [tokenizer.eos_id, *ends]})
    talked, shown = (tokenizer.decode(cut(ids, ends)) for ids in (texts[1], texts[0]))
    options = ["--temperature", "0", "--max-new-tokens", "12"]
    for more in ([], ["--draft", "1"]):
        assert main(["generate", str(copied), "--prompt", "def ", *options, *more]) == 0
        assert capsys.readouterr().out == f"def {shown}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main(["chat", str(copied), *options]) == 0
    assert capsys.readouterr().out == f"{talked}\n"
    engine, pieces = Engine(*load(str(copied)), 1, 1, 60.0), queue.SimpleQueue()
    engine.submit([Job(asked[0], 12, Sampling(), 0, (), lambda *piece: pieces.put(piece))])
    written, finish = "", None
    while finish is None:
        piece, finish, _ = pieces.get(timeout=60)
        written += piece
    engine.close()
    assert (written, finish) == (shown, "stop")


def cut(ids, ends):
    return ids[: next(place for place, token in enumerate(ids) if token in ends)]


@pytest.mark.parametrize("ids", ["1", [1, None], 1.5])
def test_an_end_that_is_no_id_is_one_line(ids, folder, tmp_path, capsys):
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    write_json(copied / "generation_config.json", {"eos_token_id": ids})
    assert main(["generate", str(copied), "--prompt", "a"]) == 2
    assert (
        f"generation_config.json: eos_token_id={json.dumps(ids)}: must be a whole number, or a list"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seed", "-1"], "argument --seed: '-1' must be a whole number from 0 to 2^63 - 1"),
        (["--prompt", "\udcff"], "the text is not valid Unicode: character 0 is an unpaired surrogate"),
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


@pytest.mark.parametrize(
    "words, message",
    [
        (["--api-key", "two words"], "--api-key: must be of ASCII letters"),
        (["--api-key", ""], "--api-key: must be of ASCII letters"),
        (["--cors-origin", "localhost:3000"], "--cors-origin localhost:3000: must be such as http://localhost:3000"),
        (["--cors-origin", "http://a.example/"], "--cors-origin http://a.example/: must be such as"),
        (["--body-megabytes", "0"], "argument --body-megabytes: '0' must be a number above 0"),
    ],
)
def test_a_key_or_origin_that_no_client_can_send_is_one_line_before_the_model_is_read(words, message, capsys):
    assert main(["serve", "no/such/model", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "host, key, warned", [("0.0.0.0", None, True), ("0.0.0.0", "secret", False), ("127.0.0.1", None, False)]
)
def test_a_model_that_anybody_can_reach_is_reported(host, key, warned, folder, monkeypatch, capsys):
    """The key of the environment counts as that of the flag."""
    run = pytest.importorskip("dsv3_lightning.inference.server.run", exc_type=ImportError)
    monkeypatch.setattr(run.Server, "run", lambda *_: None)
    if key:
        monkeypatch.setenv("DSV3_API_KEY", key)
    assert main(["serve", folder, "--host", host, "--port", "0"]) == 0
    error = capsys.readouterr().err
    assert ("--host 0.0.0.0 without a key: whoever reaches this machine can use the model" in error) == warned
    assert warned or not error


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


def test_a_chat_that_outgrows_the_context_drops_its_oldest_turns_and_continues(model, tokenizer):
    """Its answer is that of a conversation which begins with the system message and the turns that are left."""
    chat, end = Chat(model, tokenizer, Sampling(), 0, "be brief", context=200), {tokenizer.eos_id}
    answers, dropped = {}, 0
    questions = ["a " * 20, "b " * 20, "c " * 20, "d " * 20]
    for place, question in enumerate(questions):
        answers[question] = "".join(chat.reply(question, 9))
        dropped += chat.dropped
        ids = chat_prompt(tokenizer, [("system", "be brief"), ("user", questions[dropped])])
        for after in questions[dropped + 1 : place + 1]:
            (new,) = decode(model, [ids], 9, Sampling(), end, 0)
            ids = [*ids, *new, tokenizer.eos_id, *chat_prompt(tokenizer, [("user", after)])[1:]]
        if not dropped or place == dropped:  # else the answers before were given to more than what is left
            (new,) = decode(model, [ids], 9, Sampling(), end, 0)
            assert answers[question] == tokenizer.decode(new)
        assert len(chat.head) + sum(map(len, chat.turns)) <= 201
    assert 0 < dropped < len(questions)
    with pytest.raises(ConfigError, match="with the system message this turn has .* tokens; the context holds 200"):
        "".join(chat.reply("a " * 400, 20))
    turns = len(chat.turns)
    assert "".join(chat.reply("e", 9)) and len(chat.turns) > turns - chat.dropped  # as if that was never asked
    chat.reset()
    fresh = Chat(model, tokenizer, Sampling(), 0, "be brief")
    assert "".join(chat.reply("again", 9)) == "".join(fresh.reply("again", 9))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_stays_where_a_turn_cannot_be_answered_and_reset_starts_over(folder, monkeypatch, capsys):
    options = ["--temperature", "0", "--max-new-tokens", "30", "--context", "120"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main(["chat", folder, *options]) == 0
    answer = capsys.readouterr().out
    said = "hi\n" + "x " * 200 + "\n\udce9\n/reset\nhi\n" + "a " * 20 + "\n" + "b " * 20 + "\n"
    monkeypatch.setattr("sys.stdin", Terminal(said))
    assert main(["chat", folder, *options]) == 0
    out, error = capsys.readouterr()
    assert out.startswith(f"> {answer}> > > > {answer}> ")
    reported = error.splitlines()
    assert "this turn has " in reported[0] and "the context holds 120" in reported[0]
    assert reported[1] == "dsv3: standard input: line 3 is not UTF-8 text (it has the byte 0xe9)"
    assert reported[2] == "dsv3: the conversation starts over"
    assert reported[3].startswith("dsv3: the context of 120 tokens is full: the oldest ") and "/reset" in reported[3]


def test_a_file_that_is_not_utf8_is_named_with_its_line(folder, monkeypatch, capsys):
    """As Python's own standard input gives it, which is strict."""
    latin = io.TextIOWrapper(io.BytesIO("hi\nça va\n".encode("latin-1")), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", latin)
    assert main(["chat", folder, "--max-new-tokens", "2"]) == 2
    error = capsys.readouterr().err
    assert error == "dsv3: error: standard input: line 2 is not UTF-8 text (it has the byte 0xe7)\n"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_in_the_models_own_format_is_refused_with_advice_that_works(
    name, folder, model, tokenizer, tmp_path, monkeypatch, capsys
):
    """Ours passes, in either file, and so does a folder without any; whatever comes first for transformers counts."""
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    config = json.loads((copied / "tokenizer_config.json").read_text(encoding="utf-8"))
    ours = config.pop("chat_template")

    def talk(template):
        if name.endswith("jinja"):
            (copied / name).write_text(template, encoding="utf-8")
        else:
            write_json(copied / name, config | {"chat_template": template})
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        code = main(["chat", str(copied), "--temperature", "0", "--max-new-tokens", "2"])
        return code, capsys.readouterr().err

    for template in (ours, ours + "\n"):
        assert talk(template) == (0, "")
    several = [{"name": "default", "template": "x"}]
    for template in ["{{ messages[0]['content'] }}"] + [several] * name.endswith("json"):
        code, error = talk(template)
        assert code == 2 and error.count("\n") == 1
        assert (
            "the model's chat_template is not the one" in error
            and "dsv3 generate --parse-special, or to /v1/completions" in error
        )
    words = ["--prompt", f"{USER}hi{ASSISTANT}", "--temperature", "0", "--max-new-tokens", "9"]
    assert main(["generate", str(copied), *words, "--parse-special"]) == 0  # as the message says
    (new,) = decode(model, [chat_prompt(tokenizer, [("user", "hi")])], 9, Sampling(), {tokenizer.eos_id}, 0)
    assert capsys.readouterr().out == f"{USER}hi{ASSISTANT}{tokenizer.decode(new)}\n"
    assert main(["generate", str(copied), *words]) == 0
    assert capsys.readouterr().out != f"{USER}hi{ASSISTANT}{tokenizer.decode(new)}\n"
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    write_json(copied / "tokenizer_config.json", config)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main(["chat", str(copied), "--max-new-tokens", "2"]) == 0


def test_a_shorter_context_is_less_cache_and_a_limit(folder, model, tokenizer, monkeypatch, capsys):
    engine = Engine(model, tokenizer, 3, 1, 60.0, context=40)
    assert engine.decoder.cache.entries.shape[1:3] == (3, 40)
    with pytest.raises(ConfigError, match="41 tokens is longer than the context of 40"):
        engine.submit([Job([5] * 41, 1, Sampling(), 0, (), print)])
    engine.close()
    monkeypatch.setattr("sys.stdin", io.StringIO("a b c d e f\n"))
    assert main(["chat", folder, "--context", "5"]) == 2
    assert "the context holds 5" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["serve", "chat"])
def test_a_context_that_cannot_be_is_one_line(verb, folder, tmp_path, capsys):
    if verb == "serve":
        pytest.importorskip("uvicorn")
    port = ["--port", "0"] * (verb == "serve")
    for given, message in (
        ("0", "argument --context: '0' must be"),
        ("513", "--context 513: must be between 1 and 512"),
    ):
        assert main([verb, folder, *port, "--context", given]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    write_json(copied / "config.json", config | {"max_position_embeddings": 10**15})  # more than any machine has
    assert main([verb, str(copied), *port]) == 2
    error = capsys.readouterr().err
    rows, flags = (16, "--context or --slots") if verb == "serve" else (1, "--context")
    assert f"a cache for {rows} x {10**15} tokens takes " in error and error.endswith(f"; lower {flags}\n")
    assert error.count("\n") == 1


def test_the_format_of_a_prompt(tokenizer):
    ids = chat_prompt(tokenizer, [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r")])
    text = tokenizer.decode(ids)
    assert text == "<｜begin▁of▁sentence｜>s<｜User｜>q<｜Assistant｜>a<｜end▁of▁sentence｜><｜User｜>r<｜Assistant｜>"
    with pytest.raises(ConfigError, match="role=tool: must be system, user or assistant"):
        chat_prompt(tokenizer, [("tool", "x")])
    for messages in ([("user", "q"), ("system", "s")], [("system", "s"), ("system", "t")]):
        with pytest.raises(ConfigError, match="role=system: must be the first message, and the only one of that role"):
            chat_prompt(tokenizer, messages)
