"""What is exported comes back bit by bit; the key list is the released one; a folder that doesn't fit is refused."""

import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub import export
from dsv3_lightning.hub.config import from_json, to_json
from dsv3_lightning.hub.export import into_files, plan, write_folder, write_weights
from dsv3_lightning.hub.folder import HubFolder, check_same_model
from dsv3_lightning.model.transformer import Transformer
from dsv3_lightning.planning.parameters import count_parameters

from .folders import LLAMA, V2_GROUPS, V2_LITE, biased, exported, imported, small_config

ROUND = {
    "v3": small_config(num_nextn_predict_layers=2),
    "halves": small_config(rope_interleave=False, num_nextn_predict_layers=1),
    "tied": small_config(tie_word_embeddings=True, num_nextn_predict_layers=1),
    "no shared experts": small_config(n_shared_experts=0),
    "v2": small_config(**V2_GROUPS),
    "v2-lite": small_config(**V2_LITE),
    "llama": small_config(**LLAMA),
    "llama, pairs": small_config(**LLAMA | {"rope_interleave": True}),
}


@pytest.mark.parametrize("name", ROUND)
def test_weights_come_back_bit_by_bit(name, tmp_path):
    model = biased(ROUND[name])
    again = imported(exported(model, tmp_path / "out"), model.config)  # its rotary order, whatever the folder's is
    own, other = model.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    for key in own:
        assert torch.equal(own[key], other[key]), key


@pytest.mark.parametrize("name", [name for name in ROUND if "halves" not in name and "pairs" not in name])
def test_config_json_comes_back(name):
    config = ROUND[name]
    content = json.loads(json.dumps(to_json(config, {}, "float32")))
    again = from_json(content, "config.json").config
    assert replace(again, num_key_value_heads=config.num_key_value_heads) == config


@pytest.mark.parametrize("preset", ["v3", "v2-lite", "moonlight", "llm-7b", "llm-67b", "laptop"])
def test_presets_can_be_exported_and_come_back(preset):
    config = check(compose([preset]).tree).model
    described = from_json(to_json(config, {}, "bfloat16"), "config.json")
    assert check_same_model(described.config, config, "x") == [] and described.notes == []


@pytest.mark.parametrize("fails", [False, True])
def test_an_export_removes_nothing_of_others(fails, tmp_path):
    """Not OUT.new, folder or file, which was once where exports were written; and nothing of its own stays but OUT."""
    (tmp_path / "out.new").mkdir()
    (tmp_path / "out.new/notes.txt").write_text("precious")
    (tmp_path / "again.new").write_text("precious")
    before = {path.name for path in tmp_path.iterdir()}

    def write(folder):
        (folder / "config.json").write_text("{}")
        if fails:
            raise OSError(28, "No space left on device")

    for name in ("out", "again"):
        if fails:
            with pytest.raises(ConfigError, match=rf"{name}: can't be written \(No space left on device\)"):
                write_folder(tmp_path / name, write)
        else:
            write_folder(tmp_path / name, write)
            assert [path.name for path in (tmp_path / name).iterdir()] == ["config.json"]
            assert (tmp_path / name).stat().st_mode == (tmp_path / "out.new").stat().st_mode
    assert (tmp_path / "out.new/notes.txt").read_text() == (tmp_path / "again.new").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == before | (set() if fails else {"out", "again"})


def test_of_two_exports_to_one_folder_the_first_to_end_has_it(tmp_path):
    out = tmp_path / "out"

    def write(folder):
        (folder / "a").write_text("slow")
        if not out.exists():
            write_folder(out, lambda other: (other / "a").write_text("fast"))
        assert (folder / "a").read_text() == "slow"

    with pytest.raises(ConfigError, match="out: already exists"):
        write_folder(out, write)
    assert (out / "a").read_text() == "fast" and list(tmp_path.iterdir()) == [out]


V3_LAYER = """input_layernorm.weight post_attention_layernorm.weight self_attn.q_a_proj.weight self_attn.q_b_proj.weight
self_attn.kv_a_proj_with_mqa.weight self_attn.kv_b_proj.weight self_attn.o_proj.weight self_attn.q_a_layernorm.weight
self_attn.kv_a_layernorm.weight""".split()
V3_MOE = """mlp.gate.weight mlp.gate.e_score_correction_bias mlp.shared_experts.gate_proj.weight
mlp.shared_experts.up_proj.weight mlp.shared_experts.down_proj.weight""".split()
V3_MTP = "enorm.weight hnorm.weight eh_proj.weight embed_tokens.weight shared_head.norm.weight shared_head.head.weight"


def test_keys_and_shapes_of_671b_are_the_released_ones():
    """README_WEIGHTS.md of the released checkpoint: 61 layers and the MTP module as the 62nd, 685B with its copies."""
    config = check(compose(["v3"]).tree).model
    shapes = {item.stored.key: item.shape for item in plan(config, torch.bfloat16)}
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(62):
        parts = list(V3_LAYER)
        if i < 3:
            parts += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        else:
            parts += V3_MOE
            parts += [f"mlp.experts.{e}.{n}_proj.weight" for e in range(256) for n in ("gate", "up", "down")]
        expected |= {f"model.layers.{i}.{part}" for part in (*parts, *(V3_MTP.split() if i == 61 else ()))}
    assert shapes.keys() == expected
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert shapes["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.60.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert shapes["model.layers.60.mlp.experts.0.gate_proj.weight"] == (2048, 7168)
    counts = count_parameters(config)
    copies = 2 * 129280 * 7168
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total == counts.total + counts.bias_entries + copies == 684_489_845_504
    files = into_files(plan(config, torch.bfloat16), 5 * 10**9)
    assert sum(len(file) for file in files) == len(shapes)
    assert max(sum(item.bytes for item in file) for file in files) <= 5 * 10**9


def test_memory_stays_at_one_file(tmp_path, monkeypatch):
    """A model of 40 files: what is alive at any time is a file, and the matrix that comes next, not all experts'."""
    config = small_config(
        vocab_size=64, hidden_size=64, num_hidden_layers=12, n_routed_experts=16, moe_intermediate_size=128
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    peak, size, largest = 0, 1_000_000, 0
    made: list[weakref.ref[torch.Tensor]] = []

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal peak
        made.append(weakref.ref(tensor))
        peak = max(peak, sum(t.untyped_storage().nbytes() for ref in made if (t := ref()) is not None))
        return tensor

    def read(name: str, expert: int | None) -> torch.Tensor:
        nonlocal largest
        tensor = torch.zeros(shapes[name] if expert is None else shapes[name][1:])
        largest = max(largest, tensor.nbytes)
        return noted(tensor)

    cast = export.cast
    monkeypatch.setattr(export, "cast", lambda *arguments: noted(cast(*arguments)))
    total = write_weights(config, read, tmp_path, torch.float32, size)
    files = list(tmp_path.glob("*.safetensors"))
    assert total > 15 * size and len(files) >= total // size
    assert max(path.stat().st_size for path in files) < 1.1 * size
    assert 0.9 * size < peak <= size + 2 * largest < 1.2 * size, "tensors pile up"


@pytest.mark.slow
def test_671b_leave_file_by_file(tmp_path, monkeypatch):
    """The report's model, in tensors that have shapes and no numbers, into files that take none: every key is in the
    index, and what would be in memory at any time is a file, and the matrix that comes next."""
    config = check(compose(["v3"], []).tree).model
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    alive = peak = 0
    written: dict[str, int] = {}

    def freed(size: int) -> None:
        nonlocal alive
        alive -= size

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal alive, peak
        alive += tensor.nbytes
        peak = max(peak, alive)
        weakref.finalize(tensor.untyped_storage(), freed, tensor.nbytes)
        return tensor

    def read(name: str, expert: int | None) -> torch.Tensor:
        return noted(torch.empty(shapes[name] if expert is None else shapes[name][1:], device="meta"))

    def sink(tensors, path, metadata):
        written[path.name] = sum(tensor.nbytes for tensor in tensors.values())
        path.touch()

    monkeypatch.setattr(export, "cast", lambda tensor, dtype, _: noted(tensor.to(dtype, copy=True)))
    monkeypatch.setattr(export, "save_file", sink)
    size, largest = 5 * 10**9, 4 * 129_280 * 7168
    total = write_weights(config, read, tmp_path, torch.bfloat16, size)
    assert size < peak <= size + largest + largest // 2, "tensors pile up"  # the embedding, in fp32 and as it leaves
    assert sum(written.values()) == total and max(written.values()) <= size and len(written) > 270
    index = json.loads((tmp_path / export.INDEX).read_text())
    # embedding, norm, head; 61 layers of 9; 3 of them dense; 58 routers and the MTP module's, which has six of its own
    router = 2 + 3 * 256 + 3
    assert len(index["weight_map"]) == 3 + 61 * 9 + 3 * 3 + 58 * router + (9 + router + 6) == 46_183
    assert set(index["weight_map"].values()) == set(written) == {path.name for path in tmp_path.glob("*.safetensors")}


@pytest.mark.slow
def test_fp8_blocks_are_numbers_times_their_scale(tmp_path):
    """Against a loop over blocks; sizes that 128 does not divide, and uneven scales, so that a shifted block shows."""
    model = biased(small_config(hidden_size=160, intermediate_size=200, moe_intermediate_size=136))
    folder = exported(model, tmp_path / "out", file_bytes=10**9)
    (file,) = folder.glob("*.safetensors")
    tensors, expected = load_file(file), {}
    for key in [key for key in tensors if re.search(r"(proj|proj_with_mqa)\.weight", key)]:
        weight = tensors.pop(key)
        rows, columns = weight.shape
        scales = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.01
        narrow = weight.clamp(-3, 3).to(torch.float8_e4m3fn)
        wide = torch.zeros(rows, columns, dtype=torch.float64)
        for i in range(rows):
            for j in range(0, columns, 8):
                wide[i, j : j + 8] = narrow[i, j : j + 8].double() * scales[i // 128, j // 128].double()
        tensors |= {key: narrow, f"{key}_scale_inv": scales}
        expected[key] = wide
    file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(content))
    source, again = HubFolder(folder), imported(folder)
    for key, wide in expected.items():
        torch.testing.assert_close(source.read(key).double(), wide, rtol=1e-7, atol=0)
    down = again.layers[1].mlp.experts.down_proj[3]  # type: ignore[union-attr]
    torch.testing.assert_close(
        down.T.double(), expected["model.layers.1.mlp.experts.3.down_proj.weight"], rtol=1e-7, atol=0
    )
    assert not any(parameter.isnan().any() for parameter in again.parameters())


@pytest.mark.slow
def test_an_export_in_fp8_has_the_released_layout_and_comes_back(tmp_path):
    """Read by an independent loop over blocks, too. Sizes that 128 does not divide."""
    config = small_config(hidden_size=160, intermediate_size=200, moe_intermediate_size=136, num_nextn_predict_layers=1)
    model = biased(config)
    plain = exported(model, tmp_path / "plain", file_bytes=10**9)
    folder = exported(model, tmp_path / "out", "fp8", file_bytes=300_000)
    content = json.loads((folder / "config.json").read_text())
    assert content["torch_dtype"] == "bfloat16" and content["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
    }  # fmt: skip
    (original,) = (load_file(file) for file in plain.glob("*.safetensors"))
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    found = {key: tensor for tensors in files for key, tensor in tensors.items()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys() and len(files) > 3
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for tensors in files:
        assert all(key.removesuffix("_scale_inv") in tensors for key in tensors)
    scaled = {key.removesuffix("_scale_inv") for key in found if key.endswith("_scale_inv")}
    assert scaled == {key for key in original if re.search(r"(self_attn|mlp)\..*proj(_with_mqa)?\.weight", key)}
    source = HubFolder(folder)
    source.audit()
    for key, weight in original.items():
        if key not in scaled:
            wanted = weight if key.endswith("correction_bias") else weight.bfloat16()
            assert torch.equal(found[key], wanted) and found[key].dtype == wanted.dtype, key
            continue
        numbers, scales = found[key], found[f"{key}_scale_inv"]
        assert numbers.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
        wide = torch.zeros(weight.shape, dtype=torch.float64)
        for i in range(weight.shape[0]):
            for j in range(0, weight.shape[1], 8):
                wide[i, j : j + 8] = numbers[i, j : j + 8].double() * scales[i // 128, j // 128].double()
        steps = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        assert ((wide - weight).abs() <= 1.001 * torch.maximum(weight.abs() / 16, steps / 1024)).all(), key
        torch.testing.assert_close(source.read(key).double(), wide, rtol=1e-7, atol=0)
    assert not any(parameter.isnan().any() for parameter in imported(folder).parameters())


@pytest.mark.parametrize("indexed", [True, False])
def test_pickled_weights_of_older_releases_are_read_without_running_code(indexed, tmp_path):
    """As DeepSeek LLM's: pytorch_model.bin, alone or in parts with an index."""
    model = biased(ROUND["llama"])
    folder = exported(model, tmp_path / "out")
    (folder / "model.safetensors.index.json").unlink()
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    parts = {f"pytorch_model-{i}.bin": load_file(file) for i, file in enumerate(files)}
    if indexed:
        places = {key: name for name, tensors in parts.items() for key in tensors}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        parts = {"pytorch_model.bin": {key: tensor for tensors in parts.values() for key, tensor in tensors.items()}}
    for file in files:
        file.unlink()
    for name, tensors in parts.items():
        torch.save(tensors, folder / name)
    assert all(torch.equal(a, b) for a, b in zip(imported(folder).parameters(), model.parameters(), strict=True))
    torch.save({"x": print}, folder / list(parts)[-1])
    with pytest.raises(ConfigError, match=r"pytorch_model.*\.bin: can't be read \(Weights only load failed"):
        imported(folder)


def one_file(tmp_path, **changes):
    folder = exported(biased(small_config(**changes)), tmp_path / "out", file_bytes=10**9)
    (folder / "model.safetensors.index.json").unlink()
    (file,) = folder.glob("*.safetensors")
    return folder, file.rename(folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.gate.weight"), "lacks model.layers.1.mlp.gate.weight"),
        (lambda t: t.update({"model.layers.9.x": torch.ones(1)}), "has no place for, model.layers.9.x"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \[3\], config.json"),
        (
            lambda t: t.update({"model.layers.3.shared_head.head.weight": t["lm_head.weight"] + 1}),
            "model.layers.3.shared_head.head.weight differs from lm_head.weight",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            r"lm_head.weight is FP8 \(F8_E4M3\), and there is no lm_head.weight_scale_inv",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(change, message, tmp_path):
    folder, file = one_file(tmp_path, num_nextn_predict_layers=1)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=message):
        imported(folder)


def test_a_cut_file_and_no_file_are_one_line(tmp_path):
    folder, file = one_file(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="can't be read"):
        imported(folder)
    file.unlink()
    with pytest.raises(ConfigError, match="model.safetensors: can't be read"):
        imported(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="model.safetensors.index.json: is no index of weight files"):
        imported(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "qwen3"}, "model_type=qwen3: must be deepseek_v3"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: only silu"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type linear: only MLA's yarn"),
        ({"n_group": 3}, "n_group=3: does not divide"),
        ({"hidden_size": "big"}, "config.json: "),
    ],
)
def test_another_architecture_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_json(to_json(small_config(), {}, "float32") | changes, "config.json")


def test_absent_fields_are_named_with_what_is_taken():
    content = to_json(small_config(), {}, "float32")
    del content["scoring_func"], content["rms_norm_eps"]
    content["a_new_one"] = 1
    described = from_json(content, "config.json")
    assert described.config.scoring_func == "sigmoid" and described.config.rms_norm_eps == 1e-6
    assert described.notes == [
        "config.json: not used: a_new_one",
        "config.json: absent, so taken as rms_norm_eps=1e-06, scoring_func=sigmoid",
    ]
    del content["kv_lora_rank"], content["vocab_size"]
    with pytest.raises(ConfigError, match="lacks vocab_size"):
        from_json(content, "config.json")


@pytest.mark.parametrize("factor", [40, 40.0])
def test_both_spellings_of_yarn_are_read(factor):
    """`rope_scaling` next to `rope_theta`, and `rope_parameters` with both, as transformers 5 saves."""
    content = to_json(small_config(), {}, "float32")
    yarn = {"factor": factor, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.0}
    old = from_json(content | {"rope_scaling": {"type": "yarn", **yarn}}, "").config
    del content["rope_theta"], content["rope_scaling"]
    new = from_json(content | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, **yarn}}, "").config
    assert old == new and old.rope_scaling is not None and old.rope_scaling.factor == 40.0 and old.rope_theta == 100.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"expert_bias_kind": "multiplicative"}, "expert_bias_kind=multiplicative"),
        ({"scoring_func": "softmax"}, "scoring_func=softmax with topk_method=noaux_tc"),
        ({"mtp_kind": "parallel", "num_nextn_predict_layers": 1}, "mtp_kind=parallel"),
        (LLAMA | {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 8}, "num_moe_layers=2: no released architecture"),
    ],
)  # fmt: skip
def test_a_function_that_no_reader_has_is_not_exported(changes, message):
    with pytest.raises(ConfigError, match=message):
        to_json(small_config(**changes), {}, "float32")


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    model = biased(small_config())
    with torch.no_grad():
        model.norm.weight[0] = 1e6
    with pytest.raises(ConfigError, match="model.norm.weight: holds a number that is not finite in float16"):
        exported(model, tmp_path / "out", "float16")
    assert list(tmp_path.iterdir()) == []
    exported(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="already exists"):
        exported(model, tmp_path / "out")
