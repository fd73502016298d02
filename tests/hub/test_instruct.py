"""Instruction tuning, from conversations to an export that transformers talks with."""

import io
import json
from pathlib import Path

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.common.json_files import read_json
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.data.text.questions import conversations, write
from dsv3_lightning.inference.chat import Chat, chat_prompt
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.runs.models import load
from dsv3_lightning.training.schedule import lr_factor

pytestmark = pytest.mark.slow

PAIRS = {"who are you?": "A small model.", "2 + 2": "4", "say it in Chinese": "数据 🙂", "stop": "I stop."}
EASY = [
    "trainer.max_steps=80", "trainer.precision=32", "trainer.val_check_interval=80", "data.sequence_length=64",
    "data.validation_fraction=0.0", "data.mask_document_ends=true", "data.isolate_documents=true",
    "optimizer.lr=5e-3", "optimizer.warmup_steps=5", "callbacks.checkpoint.every_n_steps=80",
    "callbacks.throughput.peak_flops=1e11", "callbacks.sample_text=null", "callbacks.router_probe=null",
]  # fmt: skip


@pytest.fixture(scope="module", params=[None, "<|EOT|>"])
def learned(request, tmp_path_factory):
    """A run that knows four conversations by heart, packed into one sample; the end token is V3's or another."""
    base = tmp_path_factory.mktemp("by_heart")
    talks = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in PAIRS.items()
    ]
    lines = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
    (base / "talks.jsonl").write_text(lines, encoding="utf-8")
    words = [f"run.dir={base}", f"data.paths=[{base / 'talks.jsonl'}]", "data.text_key=messages", *EASY]
    end = [] if request.param is None else [f"data.end_token='{request.param}'"]
    assert main(["run", "nano", "run.name=talks", *words, *end]) == 0
    assert main(["export", str(base / "talks"), str(base / "out"), "--verify"]) == 0
    return base, request.param or "<｜end▁of▁sentence｜>"


def test_every_file_names_the_same_end_token(learned):
    from transformers import AutoTokenizer

    base, end = learned
    folder, theirs = base / "out", AutoTokenizer.from_pretrained(base / "out")
    contents = [read_json(folder / name) for name in ("config.json", "generation_config.json")]
    assert {content["eos_token_id"] for content in contents} == {theirs.eos_token_id}
    assert theirs.eos_token == end == read_json(folder / "tokenizer_config.json")["eos_token"]
    for role in ("bos", "pad"):
        assert {content[f"{role}_token_id"] for content in contents} == {getattr(theirs, f"{role}_token_id")}


@torch.no_grad()
def test_both_stop_where_the_answer_ends(learned):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, end = learned
    theirs, words = (cls.from_pretrained(base / "out") for cls in (AutoModelForCausalLM, AutoTokenizer))
    model, tokenizer = load(str(base / "talks"))
    for asked, said in PAIRS.items():
        messages = [{"role": "user", "content": asked}]
        prompt = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt == chat_prompt(tokenizer, [("user", asked)])
        ids = torch.tensor([prompt])
        text = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
        new = text[0, len(prompt) :].tolist()
        (ours,) = decode(model, [prompt], 200, Sampling(), {tokenizer.eos_id}, seed=0)
        assert new == [*ours, tokenizer.eos_id] and words.decode(new) == said + end
        assert "".join(Chat(model, tokenizer, Sampling(), 0, "").reply(asked, 200)) == said


QUICK = [
    "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=2", "trainer.precision=32",
    "callbacks.throughput.peak_flops=1e11", "callbacks.router_probe=null",
]  # fmt: skip


def test_the_recipe_goes_from_a_run_to_a_chat(tmp_path, data_cache, monkeypatch, capsys):
    """docs/inference.md's commands, in short form."""
    monkeypatch.chdir(tmp_path)
    assert main(["run", "laptop", "callbacks.sample_text=null", *data_cache, *QUICK]) == 0
    assert write(Path("runs/questions.jsonl")) > 2000
    assert main(["run", "instruct", *QUICK]) == 0
    report = json.loads(Path("runs/instruct/report.json").read_text())
    assert report["steps"] == 2 and 0 < report["val_bpb"] < 20 and report["gzip_bpb"] > 2
    page = Path("runs/instruct/report.md").read_text()
    assert "What it writes" not in page and "`dsv3 chat " in page and "dsv3 generate" not in page
    monkeypatch.setattr("sys.stdin", io.StringIO("What does json.loads do?\n"))
    capsys.readouterr()
    assert main(["chat", "runs/instruct", "--temperature", "0", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()
    config = check(compose(["instruct"]).tree)
    first, last = (lr_factor(step, 292, 0, config.optimizer.phases) for step in (0, 292))
    assert (first, last) == (1.0, pytest.approx(0.2))  # 5e-6 to 1e-6
    assert config.callbacks["expert_bias"]["speed"] == 0 and config.data.isolate_documents


def test_the_questions_are_the_librarys_own():
    found = {talk[0]["content"]: [message["content"] for message in talk[1:]] for talk in conversations()}
    assert found["What does json.loads do?"][0].startswith("Deserialize ``s`` (a ``str``, ``bytes`` or ``bytearray``")
    assert found["What does textwrap.shorten do?"][1:] == [
        "How is it called?", "textwrap.shorten(text, width, **kwargs)",
    ]  # fmt: skip
    assert found["What does fractions.Fraction do?"][2] == "fractions.Fraction is a class."
