"""Folders that others wrote: what they may leave next to the weights, leave out, or write in another way."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_lightning.cli import main
from dsv3_lightning.config.compose import compose
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.config import from_json, to_json
from dsv3_lightning.hub.folder import HubFolder
from dsv3_lightning.hub.tokens import write_tokenizer
from dsv3_lightning.model.config import Yarn
from dsv3_lightning.model.rope import inverse_frequencies

from .folders import biased, exported, imported, small_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"
PROJECTION = "_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a tokenizer, of a model with 30 rows more than that has ids. Its weights are one file."""
    tokenizer = Tokenizer.train(["some plain words, 12 34"] * 3, 290)
    model = biased(small_config(vocab_size=tokenizer.vocab_size + 30))
    folder = exported(model, tmp_path_factory.mktemp("others") / "whole", file_bytes=10**9)
    write_tokenizer(tokenizer, folder, 128)
    (folder / "model.safetensors.index.json").unlink()
    next(folder.glob("*.safetensors")).rename(folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path / "hf")
    return tmp_path / "hf"


def change_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in (content | changes).items() if value != "absent"}))


def refused(folder, capsys):
    """The one line of an import, which leaves nothing behind."""
    before = {path.name for path in folder.parent.iterdir()}
    assert main(["import", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("dsv3: error: ")
    assert {path.name for path in folder.parent.iterdir()} == before
    return error


@torch.no_grad()
def test_scales_count_for_fp8_numbers_only(folder, capsys):
    """A conversion to bf16 with the scales left in the folder: transformers doesn't use them, and neither do we."""
    from transformers import AutoModelForCausalLM

    tensors = {key: tensor.bfloat16() for key, tensor in load_file(folder / "model.safetensors").items()}
    scales = {f"{key}_scale_inv": torch.full((1, 1), 2.0**-6) for key in tensors if key.endswith(PROJECTION)}
    save_file(tensors | scales, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    assert (imported(folder)(tokens) - theirs).abs().max() <= 1e-4
    assert main(["import", str(folder)]) == 0
    assert (
        f"not used: {len(scales)} scales of numbers that are not FP8, such as model.layers.0."
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight_block_size": [64, 64]}, "blocks of [64, 64] (quantization_config.weight_block_size) make it [1, 2]"),
        ({"weight_block_size": [128]}, "quantization_config.weight_block_size=[128]: must be two whole numbers"),
        ({"weight_block_size": [0, 128]}, "quantization_config.weight_block_size=[0, 128]: must be"),
        ({"quant_method": "awq"}, 'quantization_config.quant_method="awq": only fp8 is supported'),
        ([], "quantization_config=[]: must be an object or null, not a list"),
        ({"drop": True}, "is FP8 (F8_E4M3), and there is no model.layers.0.mlp.down_proj.weight_scale_inv"),
        ({"whole": True}, "weight_scale_inv is I64, not real numbers"),
        ({"integer": True}, "mlp.down_proj.weight is I8; read are F64, F32, F16, BF16, F8_E4M3, F8_E5M2"),
    ],
)
def test_fp8_that_can_not_be_meant_is_one_line(folder, capsys, change, message):
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.down_proj.weight"
    rows, columns = tensors[key].shape
    wide = tensors[key]
    tensors[key] = wide.to(torch.float8_e4m3fn)
    tensors[f"{key}_scale_inv"] = torch.ones(-(-rows // 128), -(-columns // 128))
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    if isinstance(change, list):
        settings = change
    elif "drop" in change:
        del tensors[f"{key}_scale_inv"]
    elif "whole" in change:
        tensors[f"{key}_scale_inv"] = tensors[f"{key}_scale_inv"].long()
    elif "integer" in change:
        tensors[key] = wide.to(torch.int8)
    else:
        settings |= change
        if change.get("weight_block_size") == [64, 64]:
            change_json(folder / "config.json", intermediate_size=72)
            for name, pad in (("gate_proj", (0, 0, 0, 32)), ("up_proj", (0, 0, 0, 32)), ("down_proj", (0, 32))):
                part = f"model.layers.0.mlp.{name}.weight"
                tensors[part] = torch.nn.functional.pad(tensors[part].float(), pad)
            tensors[key] = torch.zeros(tensors[key].shape).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(folder / "config.json", quantization_config=settings)
    assert message in refused(folder, capsys)


def test_two_sets_of_weights_are_refused_with_both_files(folder, capsys):
    """An old index with its shards and a newer single file: transformers takes the one, other readers the other."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    error = refused(folder, capsys)
    assert f"{folder / 'model.safetensors'}: there is another set" in error and f"{index} names model-00001" in error
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert main(["import", str(folder)]) == 0


def test_safetensors_beside_pickled_weights_are_taken_as_transformers_does(folder, capsys):
    from transformers import AutoModelForCausalLM

    tensors = load_file(folder / "model.safetensors")
    torch.save({key: tensor + 1 for key, tensor in tensors.items()}, folder / "pytorch_model.bin")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(imported(folder).embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert main(["import", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "weights of model.safetensors, as transformers takes them; not used: pytorch_model.bin" in text


def test_a_tensor_in_two_shards_is_refused(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    places = {key: f"{'ab'[number % 2]}.safetensors" for number, key in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "is in a.safetensors and in b.safetensors" in refused(folder, capsys)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "weight_map=null: must be an object of file names"),
        ('{"weight_map": []}', "weight_map=[]: must be an object"),
        ('{"weight_map": {"a": 3}}', "weight_map.a=3: must be the name of a file in the folder"),
        ('{"weight_map": {"a": "../model.safetensors"}}', 'weight_map.a="../model.safetensors": must be the name'),
        ("[", ": not JSON: "),
        (POINTER, "is a Git LFS pointer"),
    ],
)
def test_an_index_that_is_none_is_one_line(folder, capsys, content, message):
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    error = refused(folder, capsys)
    assert str(index) in error and message in error


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [POINTER.encode(), b"\xff\xfe\0", b"", b"[1]"])
def test_a_file_that_is_not_the_file_is_named(folder, capsys, name, content):
    (folder / name).write_bytes(content)
    error = refused(folder, capsys)
    assert str(folder / name) in error and ("is a Git LFS pointer" in error) == (content == POINTER.encode())


def test_without_a_tokenizer_import_says_what_to_do_and_later_verbs_name_the_file(folder, capsys):
    """As Moonlight, which has tiktoken.model alone."""
    (folder / "tokenizer.json").rename(folder / "tiktoken.model")
    assert main(["import", str(folder)]) == 0
    text = capsys.readouterr().out
    missing = (
        f"{folder / 'tokenizer.json'}: No such file or directory, and tiktoken.model next to it has another format"
    )
    assert missing in text and "set data.tokenizer to a tokenizer.json with this model's ids" in text
    assert "dsv3 run hf.yaml, once data.tokenizer is set, starts" in text
    assert main(["run", "hf.yaml"]) == 2 and "data.tokenizer" in capsys.readouterr().err
    for verb in (["generate", str(folder), "--prompt", "x"], ["serve", str(folder)]):
        assert main(verb) == 2
        assert missing in capsys.readouterr().err


def test_a_vocabulary_wider_than_the_tokenizers_is_said_and_a_narrower_one_refused(folder, capsys):
    assert main(["import", str(folder)]) == 0
    assert "280 of the model's 310 ids have a token; the others are never drawn" in capsys.readouterr().out
    tensors = load_file(folder / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:270].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(folder / "config.json", vocab_size=270)
    error = refused(folder, capsys)
    assert "ids go up to 279" in error and "vocab_size=270" in error


def test_whole_numbers_may_be_written_as_floats():
    content = to_json(small_config(), {}, "float32")
    floats = {name: float(value) for name, value in content.items() if type(value) is int}
    config = from_json(content | floats, "config.json").config
    assert config == from_json(content, "config.json").config
    assert all(type(value) is not float for name, value in vars(config).items() if type(content.get(name)) is int)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": None}, "hidden_size=null: must be a whole number"),
        ({"hidden_size": 40.5}, "hidden_size=40.5: must be a whole number"),
        ({"hidden_size": [40]}, "hidden_size=[40]: must be a whole number"),
        ({"hidden_size": True}, "hidden_size=true: must be a whole number"),
        ({"hidden_size": 10**30}, "hidden_size=1000000000000000000000000000000: must be at most 2^53"),
        ({"rms_norm_eps": None}, "rms_norm_eps=null: must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=NaN: must be a number"),
        ({"rope_theta": None}, "rope_theta=null: must be a number"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1: must be true or false"),
        ({"scoring_func": ["sigmoid"]}, 'scoring_func=["sigmoid"]: must be sigmoid, softmax'),
        ({"model_type": ["deepseek_v3"]}, 'model_type=["deepseek_v3"]: must be deepseek_v3'),
        ({"hidden_act": {}}, "hidden_act={}: only silu is supported"),
        ({"rope_scaling": []}, "rope_scaling=[]: must be an object or null, not a list"),
        ({"rope_parameters": "yarn"}, 'rope_parameters="yarn": must be an object or null, not text'),
        ({"rope_scaling": {"type": ["yarn"]}}, 'rope_scaling type ["yarn"]: only'),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, 'rope_scaling.factor="4": must be a number'),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 0}}, "beta_fast=0.0: must be above 0"),
        ({"num_key_value_heads": 1}, "num_key_value_heads=1: must be num_attention_heads=4"),
    ],
)
def test_a_field_of_another_type_is_named(changes, message):
    with pytest.raises(ConfigError) as error:
        from_json(to_json(small_config(), {}, "float32") | changes, "config.json")
    assert str(error.value).startswith("config.json: ") and message in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 2**31}, "num_hidden_layers=2147483648: the weights hold 3"),
        ({"n_routed_experts": 2**30}, "n_routed_experts=1073741824: the weights hold 8"),
        ({"vocab_size": 2**53, "moe_intermediate_size": 2**53, "hidden_size": 2**53}, "config.json"),
    ],
)
def test_sizes_beyond_the_weights_are_refused_before_anything_is_made(folder, capsys, changes, message):
    change_json(folder / "config.json", **changes)
    assert message in refused(folder, capsys)


def test_no_shared_experts_may_be_written_as_null(tmp_path):
    content = to_json(small_config(n_shared_experts=0), {}, "float32") | {"n_shared_experts": None}
    assert from_json(content, "config.json").config.n_shared_experts == 0


@pytest.mark.parametrize("betas", [(4, 4), (32, 1), (1, 1), (200, 150), (0.5, 0.5), (1000, 0.001)])
def test_yarns_frequencies_are_those_of_transformers(betas):
    """Also where one ramp has no width, and where no pair turns so often in the original length."""
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = {"factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": betas[0], "beta_slow": betas[1]}
    rope = {"rope_type": "yarn", "rope_theta": 100.0, **fields}
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](DeepseekV3Config(qk_rope_head_dim=16, rope_parameters=rope), "cpu")
    ours = inverse_frequencies(16, 100.0, Yarn(**fields))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_yarns_original_length_is_the_models_where_it_is_absent():
    content = to_json(small_config(), {}, "float32") | {"rope_scaling": {"type": "yarn", "factor": 2}}
    described = from_json(content, "config.json")
    yarn = described.config.rope_scaling
    assert yarn is not None and yarn.original_max_position_embeddings == described.config.max_position_embeddings
    assert "original_max_position_embeddings is absent" in described.notes[0]


def test_further_end_tokens_are_the_configs(folder):
    from dsv3_lightning.hub.tokens import read_tokenizer

    change_json(folder / "config.json", eos_token_id=[7, 9.0])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 11}))
    assert read_tokenizer(folder).end_ids == {1, 7, 9, 11}


def test_the_folder_tells_of_itself_once(folder):
    source = HubFolder(folder)
    source.audit()
    source.audit()
    assert len(source.notes) == len(set(source.notes))


@pytest.mark.parametrize("name", ["695e0514", "12e5", "010", "no", "2026-01-02", "1_000", "12:30", "x: y #z"])
def test_a_folders_name_is_text_whatever_yaml_reads_in_it(folder, name, capsys):
    """The beginning of a commit's hash may look like a number."""
    folder.rename(folder.with_name(name))
    assert main(["import", name]) == 0
    capsys.readouterr()
    assert main(["validate", f"{name}.yaml"]) == 0
    reported = capsys.readouterr()
    assert reported.out.startswith(f"ok: {name}, ") and not reported.err
    tree = compose([f"{name}.yaml"]).tree
    assert (tree["run"]["name"], tree["init_from"]) == (name, str(folder.with_name(name)))


def test_what_an_import_prints_is_relative_to_the_working_folder(folder, capsys):
    assert main(["import", str(folder), "--out", str(folder.parent / "again.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{folder.name}: ") and "tensors, all with a place" in line for line in lines)
    assert "again.yaml: written; dsv3 run again.yaml starts from these weights" in lines
