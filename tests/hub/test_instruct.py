"""Instruction tuning, from conversations to an export that transformers talks with."""

import json

import pytest
import torch

from dsv3_lightning.cli import main
from dsv3_lightning.commands.models import load
from dsv3_lightning.hub.folder import HubFolder
from dsv3_lightning.inference.chat import Chat, chat_prompt
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.sampling import Sampling

PAIRS = {"who are you?": "A small model.", "2 + 2": "4", "say it in Chinese": "数据 🙂", "stop": "I stop."}
EASY = [
    "trainer.max_steps=80", "trainer.precision=32", "trainer.val_check_interval=80", "data.sequence_length=16",
    "data.validation_fraction=0.0", "optimizer.lr=5e-3", "optimizer.warmup_steps=5", "data.mask_document_ends=true",
    "callbacks.throughput.peak_flops=1e11", "callbacks.sample_text=null", "callbacks.router_probe=null",
    "callbacks.checkpoint.every_n_steps=80",
]  # fmt: skip


@pytest.fixture(scope="module", params=[None, "<|EOT|>"])
def learned(request, tmp_path_factory):
    """A run that knows four conversations by heart, exported; the end token is V3's or another."""
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
    folder, theirs = HubFolder(base / "out"), AutoTokenizer.from_pretrained(base / "out")
    contents = [folder.json(name) for name in ("config.json", "generation_config.json")]
    assert {content["eos_token_id"] for content in contents} == {theirs.eos_token_id}
    assert theirs.eos_token == end == folder.json("tokenizer_config.json")["eos_token"]
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
