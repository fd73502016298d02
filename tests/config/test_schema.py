"""Checked settings: every refusal names the dotted key, the value and what is valid, in one line."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dsv3_lightning.callbacks.settings import CALLBACKS
from dsv3_lightning.config.compose import compose, to_yaml
from dsv3_lightning.config.schema import check, to_tree
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.balance_table import BALANCE_LOSSES
from dsv3_lightning.runs.trainer import refuse_fp8


def nano(*overrides: str) -> dict[str, Any]:
    return compose(["nano"], overrides).tree


def test_numbers_are_numbers_in_print_in_the_saved_tree_and_in_force(tmp_path):
    config = check(nano("optimizer.lr=1E-3", "trainer.max_steps=1e1", "callbacks.mtp_weight.schedule=[[0,3e-1]]"))
    assert config.optimizer.lr == 1e-3
    assert config.trainer["max_steps"] == 10 and type(config.trainer["max_steps"]) is int
    assert config.callbacks["mtp_weight"] == {"schedule": [[0, 0.3]], "by": "share"}
    (tmp_path / "printed.yaml").write_text(to_yaml(to_tree(config)), encoding="utf-8")
    assert "max_steps: 10\n" in to_yaml(to_tree(config))
    assert check(compose([str(tmp_path / "printed.yaml")]).tree) == config


def test_the_tree_in_force_holds_the_defaults_of_the_model_too():
    tree = to_tree(check(nano()))
    assert tree["model"] == asdict(check(nano()).model)
    assert tree["model"]["rope_theta"] == 10000.0 and tree["optimizer"]["betas"] == [0.9, 0.95]


def test_nested_sections_are_typed():
    config = check(nano("model.rope_scaling={factor: 40, original_max_position_embeddings: 64}"))
    assert config.model.rope_scaling is not None and config.model.rope_scaling.factor == 40.0
    assert check(nano("model.q_lora_rank=null")).model.q_lora_rank is None


FILE = "runs/my run/checkpoints/epoch=0-step=10.ckpt"


@pytest.mark.parametrize(
    ("resume", "expected"), [("auto", "auto"), ("false", False), (FILE, str(Path(FILE).absolute()))]
)
def test_resume_is_auto_false_or_a_path(resume: str, expected: str | bool):
    assert check(nano(f"run.resume={resume}")).run.resume == expected


def test_names_in_any_script_are_fine():
    assert check(nano("run.name=实验", 'data.paths=["数据/ü b.txt"]')).data.paths == [
        str(Path("数据/ü b.txt").absolute())
    ]


def test_precision_is_text():
    assert [check(nano(f"trainer.precision={value}")).trainer["precision"] for value in ("32", "'32'", "bf16")] == [
        "32", "32", "bf16"
    ]  # fmt: skip


def test_a_callback_of_another_file_can_be_switched_off_by_name():
    assert check(nano("callbacks.mine=null")).callbacks["mine"] is None


LOSSES = ", ".join(BALANCE_LOSSES)
PARTS = "does not divide into accumulate_grad_batches × devices × num_nodes ="
NAMES = ", ".join(CALLBACKS)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # unknown and missing keys
        (["model.hiden_size=3"], "model.hiden_size: no such key; did you mean model.hidden_size?"),
        (["modle.hidden_size=3"], "modle: no such key; did you mean model?"),
        (["compute.x=3"], "compute.x: no such key; valid: activation_checkpointing, fp8, compile, compile_cache"),
        (
            ["optimizer.phases=[{unti: 1}]"],
            "optimizer.phases[0].unti: no such key; did you mean optimizer.phases[0].until?",
        ),
        (["model.rope_scaling={factor: 4}"], "model.rope_scaling.original_max_position_embeddings: missing"),
        # types
        (["optimizer.lr=abc"], 'optimizer.lr="abc": must be a number'),
        (["optimizer.lr=true"], "optimizer.lr=true: must be a number"),
        (["optimizer.lr=.nan"], "optimizer.lr=NaN: must be a number"),
        (["optimizer.lr=null"], "optimizer.lr=null: must be a number"),
        (["data.batch_size=8.5"], "data.batch_size=8.5: must be a whole number"),
        (["data.batch_size=true"], "data.batch_size=true: must be a whole number"),
        (["trainer.max_steps=3.5"], "trainer.max_steps=3.5: must be a whole number"),
        (["run.name=123"], "run.name=123: must be text, in quotes where it reads like a number"),
        (["run.resume=true"], "run.resume=true: must be auto, false or text"),
        (["loss.balance=seq"], f'loss.balance="seq": must be {LOSSES}, none or a list, of {LOSSES} or none each'),
        (["data.mask_document_ends=1"], "data.mask_document_ends=1: must be true or false"),
        (["data.paths=a.txt"], 'data.paths="a.txt": must be a list, of text each'),
        (["data.paths=[3]"], "data.paths[0]=3: must be text, in quotes where it reads like a number"),
        (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: must be a list of 2: a number, a number"),
        (["optimizer.betas[1]=x"], 'optimizer.betas[1]="x": must be a number'),
        (["model.rope_scaling=5"], "model.rope_scaling=5: must be a section or null"),
        (["compute=none"], 'compute="none": must be a section'),
        (["strategy=3"], "strategy=3: must be text or a section"),
        (["callbacks.checkpoint=3"], "callbacks.checkpoint=3: must be a section or null"),
        (["callbacks.expert_bias.speed=.nan"], "callbacks.expert_bias.speed=nan: must be a finite number"),
        (
            ["callbacks.mtp_weight.schedule=[[0,.inf]]"],
            "callbacks.mtp_weight.schedule.0.1=inf: must be a finite number",
        ),
        # values
        (["optimizer.lr=-1e-4"], "optimizer.lr=-0.0001: must be above 0"),
        (["run.name=a/b"], "run.name='a/b': must be a folder's name, without / or \\ or spaces around it"),
        (["run.name=''"], "run.name='': must be a folder's name, without / or \\ or spaces around it"),
        ([f"run.name={'x' * 256}"], f"run.name=\"{'x' * 78}…: a folder's name has at most 255 bytes"),
        (
            [f"run.resume={'x' * 256}"],
            f"run.resume=\"{'x' * 78}…: '{'x' * 40}'... is too long for a path: "
            "a name has at most 255 bytes, a path 4,095",
        ),
        (["run.seed=-1"], "run.seed=-1: must be between 0 and 2^32 - 1"),
        (
            ["data.isolate_documents=true"],
            "data.isolate_documents=true: needs data.mask_document_ends=true: no document can predict another",
        ),
        (
            ["model.num_experts_per_tok=9"],
            "model.num_experts_per_tok=9: the topk_group=2 allowed groups hold 8 experts",
        ),
        (
            ["trainer.max_steps=0"],
            "trainer.max_steps=0: must be at least 1 (optimizer steps and ranks are counted from 1)",
        ),
        (["trainer.val_check_interval=0.5"], "trainer.val_check_interval=0.5: must be a whole number"),
        (
            ["callbacks.checkpoint.every_n_steps=0"],
            "callbacks.checkpoint.every_n_steps=0: must be at least 1, or null",
        ),
        (["trainer.precision=16"], "trainer.precision=16: must be auto, 32, bf16-mixed or bf16"),
        (
            ["trainer.limit_val_batches=2.0"],
            "trainer.limit_val_batches=2.0: must be a number of batches, or a share 0.0-1.0",
        ),
        (
            ["trainer.gradient_clip_val=-1"],
            "trainer.gradient_clip_val=-1.0: must be at least 0, or null for no clipping",
        ),
        (
            ["trainer.max_epochs=3"],
            "trainer.max_epochs: not used here; the run's length is counted in optimizer steps: set trainer.max_steps",
        ),
        (
            ["trainer.callbacks=[]"],
            "trainer.callbacks: not used here; callbacks have a section of their own, `callbacks:`",
        ),
        # sections that must agree
        (
            ["data.sequence_length=512"],
            "data.sequence_length=512: the model has positions for model.max_position_embeddings=256",
        ),
        (
            ["data.sequence_length=2", "model.num_nextn_predict_layers=2"],
            "data.sequence_length=2: must be above model.num_nextn_predict_layers=2, or MTP has nothing to predict",
        ),
        (["data.vocab_size=2000"], "data.vocab_size=2000: model.vocab_size=1024 has fewer"),
        (["trainer.devices=3"], f"data.batch_size=8: {PARTS} 3 equal parts; use 6 or 9"),
        (
            ["data.batch_ramp={start: 3, increment: 1, tokens: 9}", "trainer.devices=2"],
            "data.batch_ramp.start=3: does not divide into devices × num_nodes = 2 equal parts; use 2 or 4",
        ),
        (["trainer.devices=[0,1,2]"], f"data.batch_size=8: {PARTS} 3 equal parts; use 6 or 9"),
        (
            ["trainer.accumulate_grad_batches=5", "trainer.num_nodes=2"],
            f"data.batch_size=8: {PARTS} 10 equal parts; use 10",
        ),
        (
            ["loss.mtp_weight=0.3"],
            "loss.mtp_weight=0.3: callbacks.mtp_weight sets λ too; keep the constant with callbacks.mtp_weight=null, "
            "or the schedule with loss.mtp_weight=null",
        ),
        (
            ["callbacks.mtp_weight=null"],
            "loss.mtp_weight: MTP needs a λ; set loss.mtp_weight=0.3, or callbacks.mtp_weight",
        ),
        (
            ["model.topk_method=group_limited_greedy"],
            "model.topk_method=group_limited_greedy: has no expert bias to move; set callbacks.expert_bias=null, "
            "or topk_method=noaux_tc",
        ),
        # balance losses
        (
            ["loss.balance=[batch,z]"],
            "loss.balance_factor=0.0001: must be 2 factors, one for each of loss.balance=batch, z",
        ),
        (
            ["loss.balance=[batch,none]", "loss.balance_factor=[1,1]"],
            "loss.balance=['batch', 'none']: must name each loss once; for none of them write none",
        ),
        (
            ["loss.balance=[z,z]", "loss.balance_factor=[1,1]"],
            "loss.balance=['z', 'z']: must name each loss once; for none of them write none",
        ),
        (
            ["loss.balance=[batch,z]", "loss.balance_factor=[1,-1]"],
            "loss.balance_factor=[1.0, -1.0]: must be at least 0",
        ),
        (
            ["loss.balance=device", "model.n_group=1", "model.topk_group=1"],
            "loss.balance=device: its devices are the model's groups; set model.n_group above 1",
        ),
        (
            ["model.expert_bias_kind=multiplicative", "model.topk_method=group_limited_greedy"],
            "model.expert_bias_kind=multiplicative: topk_method=group_limited_greedy has no expert bias",
        ),
        # attention
        (
            ["model.attention=gqa"],
            "model.kv_lora_rank=32: attention=gqa compresses nothing; set it to 0",
        ),
        (
            ["model.attention=gqa", "model.kv_lora_rank=0"],
            "model.q_lora_rank=32: attention=gqa compresses nothing; set it to null",
        ),
        (
            ["model.attention=gqa", "model.kv_lora_rank=0", "model.q_lora_rank=null", "model.num_key_value_heads=3"],
            "model.num_key_value_heads=3: attention=gqa needs a number that divides num_attention_heads=4",
        ),
        (
            ["model.num_key_value_heads=2"],
            "model.num_key_value_heads=2: attention=mla has keys and values for all num_attention_heads=4; "
            "leave it out, or set attention=gqa",
        ),
        (["model.kv_lora_rank=0"], "model.kv_lora_rank=0: must be at least 1 with attention=mla"),
        # no experts
        (
            ["model.first_k_dense_replace=3", "model.num_nextn_predict_layers=0"],
            "callbacks.expert_bias: the model has no mixture-of-experts layer; set callbacks.expert_bias=null",
        ),
        # callbacks
        (
            ["callbacks.sampletext=null"],
            "callbacks.sampletext: no such callback, nor a class_path; did you mean sample_text?",
        ),
        (["callbacks.foo={a: 1}"], f"callbacks.foo: no such callback, nor a class_path; valid: {NAMES}"),
    ],
)
def test_a_wrong_setting_is_reported_in_one_line(overrides: list[str], expected: str):
    with pytest.raises(ConfigError) as caught:
        check(nano(*overrides))
    assert str(caught.value) == expected


def test_settings_that_look_alike_but_are_right():
    check(nano("trainer.devices=auto"))  # the number of ranks is not known yet
    check(nano("loss.mtp_weight=0.1", "callbacks.mtp_weight=null"))
    check(nano("model.num_nextn_predict_layers=0"))  # a schedule for an absent MTP does no harm
    check(nano("trainer.accumulate_grad_batches=2", "trainer.devices=2", "trainer.num_nodes=2"))
    check(nano("trainer.limit_val_batches=0"))


def test_a_tree_without_base_says_where_the_rest_is():
    with pytest.raises(ConfigError, match=r"^run: missing; `defaults: \[base\]` brings the usual settings$"):
        check({})
    without = {key: value for key, value in nano()["trainer"].items() if key != "devices"}
    with pytest.raises(ConfigError, match=r"^trainer.devices: missing; `defaults"):
        check(nano() | {"trainer": without})
    with pytest.raises(ConfigError, match=r"^model: missing$"):
        check({key: value for key, value in nano().items() if key != "model"})


def test_fp8_products_that_the_device_lacks_are_refused():
    with pytest.raises(ConfigError, match="compute.fp8=true: torch has FP8 products.*; valid here: false, or emulated"):
        refuse_fp8(check(nano("compute.fp8=true", "trainer.accelerator=cpu")))
    refuse_fp8(check(nano("compute.fp8=emulated")))
