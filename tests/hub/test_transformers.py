"""transformers reads an export as the same model: equal logits, the same greedy text, the same MTP logits."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsv3_lightning.hub.tokens import write_generation_config
from dsv3_lightning.hub.verify import all_logits
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.generate import generate
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.model.config import Yarn
from tests.model.small import clear_batch

from .folders import LLAMA, V2_GROUPS, V2_LITE, biased, exported, small_config

GREEDY = {"max_new_tokens": 200, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}
YARN = Yarn(factor=40, original_max_position_embeddings=64, beta_fast=4, mscale=0.7, mscale_all_dim=1.0)
LONG = {"qk_rope_head_dim": 16, "max_position_embeddings": 2560}
MODELS = {
    "v3": small_config(),
    "v3 with MTP": small_config(num_nextn_predict_layers=2),
    "v3 that rotates halves": small_config(rope_interleave=False),
    "v3, tied": small_config(tie_word_embeddings=True, num_nextn_predict_layers=1),
    "v3 with YaRN": small_config(rope_scaling=YARN, **LONG),
    **{
        f"v3 with YaRN, {a} and {b}": small_config(rope_scaling=replace(YARN, mscale=a, mscale_all_dim=b), **LONG)
        for a, b in ((1.0, 0.7), (1.0, 0.0), (0.0, 0.0))
    },
    "moonlight": small_config(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2),
    "v2": small_config(**V2_GROUPS),
    "v2-lite that rotates halves": small_config(**V2_LITE, rope_interleave=False),
    "llama": small_config(**LLAMA),
    "llama that rotates pairs": small_config(**LLAMA | {"rope_interleave": True, "num_key_value_heads": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_and_greedy_text_are_equal(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model = biased(MODELS[name])
    theirs = AutoModelForCausalLM.from_pretrained(exported(model, tmp_path / "out"), attn_implementation="eager")
    tokens = clear_batch(model, B=2, T=100 if model.config.rope_scaling else 40).tokens[:, :-1]
    ours, others = model(tokens), theirs(tokens).logits
    assert others.std() > 0.3 and others.dtype == torch.float32
    assert (ours - others).abs().amax((0, 2)).max() <= 1e-4
    prompt = tokens[:1, :5]
    new = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)[0, 5:]
    assert generate(model, prompt.tolist(), 200, Sampling(), eos_id=-1, seed=0) == [new.tolist()]


@torch.no_grad()
def test_its_mtp_model_gives_our_mtp_logits(tmp_path, monkeypatch):
    """Depth 1: deeper modules get the output before the norm here, as in inference engines, after it there."""
    from transformers import AutoModelForCausalLM
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel

    MtpModel = pytest.importorskip("transformers.modeling_layers").__dict__.get("MtpModel")
    if MtpModel is None:
        pytest.skip("this transformers has no MtpModel")
    # It finds MTP modules by V3's layer number, 61, alone; ours are after the third.
    monkeypatch.setattr(DeepseekV3PreTrainedModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])
    model = biased(small_config(num_nextn_predict_layers=1))
    main = AutoModelForCausalLM.from_pretrained(exported(model, tmp_path / "out"))
    module = MtpModel.from_pretrained(main)
    tokens = clear_batch(model, B=2, T=30).tokens
    T = tokens.shape[1] - 1
    h_0 = main.model(tokens[:, :T]).last_hidden_state
    h_1 = module.forward_layer(0, h_0, torch.arange(1, T + 1)[None], None, input_ids=tokens[:, 1:])
    _, ours = all_logits(model, tokens)
    assert ours is not None
    torch.testing.assert_close(ours, main.lm_head(h_1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_both_stop_at_the_same_end_token(tmp_path):
    """transformers knows it from the exported files alone; here it is the token at the sixth place of the text."""
    from transformers import AutoModelForCausalLM

    model = biased(MODELS["v3"])
    prompt = torch.tensor([[7, 21, 3, 40]])
    (plain,) = generate(model, prompt.tolist(), 200, Sampling(), eos_id=-1, seed=0)
    end = next(token for place, token in enumerate(plain) if place >= 5 and token not in plain[:place])
    folder = exported(model, tmp_path / "out")
    tokenizer = SimpleNamespace(bos_id=1, eos_id=end, pad_id=2)
    write_generation_config(tokenizer, folder)  # type: ignore[arg-type]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=200)[0, 4:].tolist()
    (ours,) = decode(model, prompt.tolist(), 200, Sampling(), {end}, seed=0)
    assert text == [*ours, end] and 5 <= len(ours) < 200


def test_half_precision_keeps_the_bias_in_fp32(tmp_path):
    from safetensors import safe_open

    model = biased(small_config())
    folder = exported(model, tmp_path / "out", "bfloat16")
    kinds = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kinds |= {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    biases = {key for key, dtype in kinds.items() if dtype == torch.float32}
    assert biases == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}
    assert {kinds[key] for key in kinds.keys() - biases} == {torch.bfloat16}


def test_numpy_is_what_verify_writes(tmp_path):
    from dsv3_lightning.hub.verify import verification_tokens, write_logits

    model = biased(small_config(num_nextn_predict_layers=1))
    tokens = verification_tokens(None, model.config)
    write_logits(tmp_path / "verify", tokens, all_logits(model, tokens))
    again = torch.from_numpy(np.load(tmp_path / "verify/tokens.npy"))
    assert torch.equal(again, tokens)
    assert np.load(tmp_path / "verify/logits.npy").shape == (2, 64, 61)
    assert np.load(tmp_path / "verify/mtp_logits.npy").shape == (2, 63, 61)
