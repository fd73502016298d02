"""No dead knobs: each leaf of the configuration, moved once, changes what a run does, or is refused."""

import contextlib
import hashlib
import io
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.schema import check, to_tree
from tests.conftest import QUIET, ROOT, Nano

NUMBERS = "numbers"  # logged curves or final weights
FILES = "files"  # what lies in the run's folder
TEXT = "text"  # what is printed
REFUSED = "refused"
ELSEWHERE = "elsewhere"  # changes no number on purpose; the test named next to it shows that it does something

# A short run that reaches everything: validation, samples, checkpoints, both phases of each schedule.
SHORT = (
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=2",
    "optimizer.warmup_steps=1",
    "callbacks.checkpoint.every_n_steps=1",
    "callbacks.router_monitor.every_n_steps=2",
    "data.sequence_length=32",
    "callbacks.sample_text={every_n_steps: 2, prompts: [a], max_new_tokens: 2, temperature: 1.0}",
)

LEAVES = {
    "run.name": ("other", "elsewhere: every test of this folder, through tests/conftest.py"),
    "run.dir": ("other", "elsewhere: every test of this folder, through tests/conftest.py"),
    "run.seed": (2, NUMBERS),
    "run.resume": ("/nope.ckpt", REFUSED),
    "init_from": ("/nope", "elsewhere: tests/hub/test_init_from.py"),
    "dpo": ("{beta: 0}", REFUSED),
    "grpo": ("{rewards: []}", REFUSED),
    "model.vocab_size": (512, NUMBERS),
    "model.hidden_size": (32, NUMBERS),
    "model.num_hidden_layers": (2, NUMBERS),
    "model.num_attention_heads": (2, NUMBERS),
    "model.intermediate_size": (96, NUMBERS),
    "model.attention": ("gqa", REFUSED),  # with latents; tests/model/test_grouped_query_attention.py has it right
    "model.num_key_value_heads": (2, REFUSED),
    "model.kv_lora_rank": (16, NUMBERS),
    "model.q_lora_rank": ("null", NUMBERS),
    "model.qk_nope_head_dim": (8, NUMBERS),
    "model.qk_rope_head_dim": (4, NUMBERS),
    "model.v_head_dim": (8, NUMBERS),
    "model.first_k_dense_replace": (2, NUMBERS),
    "model.n_routed_experts": (8, NUMBERS),
    "model.num_experts_per_tok": (2, NUMBERS),
    "model.moe_intermediate_size": (32, NUMBERS),
    "model.n_shared_experts": (0, NUMBERS),
    "model.n_group": (2, NUMBERS),
    "model.topk_group": (1, NUMBERS),
    "model.scoring_func": ("softmax", NUMBERS),
    "model.topk_method": ("greedy", REFUSED),
    "model.expert_bias_kind": ("multiplicative", NUMBERS),
    "model.norm_topk_prob": (False, NUMBERS),
    "model.routed_scaling_factor": (1.0, NUMBERS),
    "model.num_nextn_predict_layers": (2, NUMBERS),
    "model.mtp_kind": ("parallel", NUMBERS),
    "model.max_position_embeddings": (16, REFUSED),
    "model.rope_theta": (100.0, NUMBERS),
    "model.rope_scaling": ("{factor: 4, original_max_position_embeddings: 8}", NUMBERS),
    "model.rope_interleave": (False, NUMBERS),
    "model.rms_norm_eps": (1e-2, NUMBERS),
    "model.initializer_range": (0.1, NUMBERS),
    "model.tie_word_embeddings": (True, NUMBERS),
    "data.paths": ("[/nope.txt]", REFUSED),
    "data.sources": ("{a: {paths: [/nope.txt]}}", REFUSED),
    "data.cleaning": ("{repair: 3}", REFUSED),
    "data.text_key": ("content", "elsewhere: tests/data/test_corpus.py"),
    "data.skip_bad_lines": (True, "elsewhere: tests/data/text/test_corpus.py"),
    "data.cache_dir": ("/dev/null/cache", REFUSED),
    "data.tokenizer": ("/nope.json", REFUSED),
    "data.end_token": ("'<|EOT|>'", "elsewhere: tests/data/test_conversation.py, tests/hub/test_instruct.py"),
    "data.vocab_size": (600, NUMBERS),
    "data.pretokenization": ("llm", "elsewhere: tests/data/text/test_tokenizer.py"),
    "data.tokenizer_bytes": (1000, "elsewhere: tests/data/text/test_survey.py"),
    "data.tokenizer_weights": ("{a: 1}", REFUSED),  # tests/data/text/test_survey.py has it right
    "data.fim_rate": (1.0, "elsewhere: tests/data/text/test_rewriting.py"),
    "data.split_rate": (1.0, "elsewhere: tests/data/text/test_rewriting.py"),
    "data.shard_bytes": (1000, "elsewhere: tests/data/text/test_build.py"),
    "data.max_document_bytes": (100, "elsewhere: tests/data/text/test_corpus.py"),
    "data.sequence_length": (16, NUMBERS),
    "data.packing": ("concatenate", NUMBERS),
    "data.weights_schedule": ("[{step: 1, weights: {a: 1}}]", REFUSED),
    "data.batch_size": (4, NUMBERS),
    "data.batch_ramp": ("{start: 4, increment: 2, tokens: 1000}", NUMBERS),
    "data.validation_fraction": (0.5, NUMBERS),
    "data.mask_document_ends": (True, "elsewhere: tests/data/test_dataset.py"),
    "data.isolate_documents": (True, "elsewhere: tests/model/test_isolated_documents.py"),
    "data.seed": (2, NUMBERS),
    "data.num_workers": (2, "elsewhere: tests/data/test_data_module.py"),
    "optimizer.kind": ("muon", NUMBERS),
    "optimizer.lr": (1e-4, NUMBERS),
    "optimizer.betas": ("[0.5, 0.9]", NUMBERS),
    "optimizer.eps": (1e-2, NUMBERS),
    "optimizer.moments": ("bf16", NUMBERS),
    "optimizer.weight_decay": (10.0, NUMBERS),
    "optimizer.warmup_steps": (3, NUMBERS),
    "optimizer.phases": ("[{until: 1.0, shape: linear, to: 0.0}]", NUMBERS),
    "optimizer.max_skipped_steps": (3, "elsewhere: tests/runs/test_non_finite.py"),
    "loss.balance": ("none", NUMBERS),
    "loss.balance_factor": (10.0, NUMBERS),
    "loss.mtp_weight": (0.5, REFUSED),
    "compute.activation_checkpointing": ("full", "elsewhere: tests/model/test_activation_checkpointing.py"),
    "compute.fp8": ("emulated", NUMBERS),
    "compute.compile": (True, "elsewhere: tests/training/test_compiling.py"),
    "compute.compile_cache": ("elsewhere", "elsewhere: tests/training/test_compiling.py"),
    "trainer.max_steps": (3, NUMBERS),
    "trainer.precision": ("bf16-mixed", NUMBERS),
    "trainer.accelerator": ("nope", REFUSED),
    "trainer.devices": (2, "elsewhere: tests/runs/test_same_numbers.py"),
    "trainer.num_nodes": (3, REFUSED),
    "trainer.accumulate_grad_batches": (3, REFUSED),
    "trainer.gradient_clip_val": (1e-3, NUMBERS),
    "trainer.val_check_interval": (1, NUMBERS),
    "trainer.limit_val_batches": (1, NUMBERS),
    "trainer.log_every_n_steps": (2, NUMBERS),
    "strategy": ("nope", REFUSED),
    "callbacks.expert_bias.speed": (0.1, NUMBERS),
    "callbacks.expert_bias.schedule": ("[[0.0, 0.5]]", NUMBERS),
    "callbacks.expert_bias.by": ("steps", NUMBERS),
    "callbacks.expert_bias.rule": ("proportional", NUMBERS),
    "callbacks.expert_bias.centered": (True, NUMBERS),
    "callbacks.balance_factor.schedule": ("[[0.0, 100.0]]", NUMBERS),
    "callbacks.balance_factor.by": ("epochs", REFUSED),
    "callbacks.skewed_start": ("{strength: 0.5}", NUMBERS),
    "callbacks.mtp_weight.schedule": ("[[0.0, 1.0]]", NUMBERS),
    "callbacks.mtp_weight.by": ("tokens", NUMBERS),
    "callbacks.router_monitor.every_n_steps": (3, "pictures"),
    "callbacks.router_monitor.per_layer": (True, NUMBERS),
    "callbacks.router_probe": ("null", NUMBERS),
    "callbacks.weight_average": ("{decay: 0.5}", NUMBERS),
    "callbacks.throughput.peak_flops": (2e11, "speed"),
    "callbacks.throughput.straggler": (1.2, "elsewhere: tests/callbacks/test_rank_times.py"),
    "callbacks.loss_spike": ("{threshold: 3}", "elsewhere: tests/runs/test_loss_spike.py"),
    "callbacks.garbage_collection": ("{every_n_steps: 2}", "elsewhere: tests/callbacks/test_operation.py"),
    "callbacks.memory_snapshot.history": (1000, "elsewhere: tests/callbacks/test_operation.py"),
    "callbacks.pipeline_trace": ("{every_n_steps: 2}", REFUSED),  # tests/callbacks/test_pipeline_trace.py
    "callbacks.sample_text.every_n_steps": (1, TEXT),
    "callbacks.sample_text.prompts": ("[b]", TEXT),
    "callbacks.sample_text.max_new_tokens": (3, TEXT),
    "callbacks.sample_text.temperature": (0.0, TEXT),
    "callbacks.evaluate": ("{tasks: [nowhere.jsonl]}", REFUSED),  # tests/callbacks/test_evaluate.py
    "callbacks.checkpoint.every_n_steps": (4, FILES),
    "callbacks.checkpoint.every_n_minutes": (20, "elsewhere: tests/callbacks/test_checkpoint.py"),
    "callbacks.checkpoint.keep": (1, FILES),
    "callbacks.checkpoint.keep_best": (2, FILES),
    "callbacks.checkpoint.best_by": ("loss/main", FILES),
    "callbacks.checkpoint.best_is": ("highest", FILES),
    "callbacks.progress": ("null", TEXT),
    "callbacks.run_report": ("null", FILES),
}


def leaves(node, key=""):
    """Dotted keys of everything that isn't a non-empty section."""
    if isinstance(node, dict) and node:
        return {leaf for name in node for leaf in leaves(node[name], f"{key}.{name}".lstrip("."))}
    return {key}


def observe(run, output):
    """What a run did, without times."""
    scalars = run.scalars() if run.folder.is_dir() else {}
    weights = hashlib.sha256()
    for name, value in run.weights(max(scalars["loss/main"][0])).items() if "loss/main" in scalars else ():
        weights.update(name.encode() + value.float().numpy().tobytes())
    return {
        NUMBERS: (
            {tag: curve for tag, curve in scalars.items() if not tag.startswith("throughput/")},
            weights.hexdigest(),
        ),
        FILES: sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if "events" not in path.name),
        TEXT: re.sub(r"tok/s [\d,]+|[\d:]+ left|/\S+", "", output),
        "pictures": picture_steps(run),
        "speed": run.report()["peak_flops_per_second"] if (run.folder / "report.json").is_file() else None,
    }


def picture_steps(run):
    events = EventAccumulator(str(run.folder)).Reload()
    return [image.step for tag in events.Tags()["images"] for image in events.Images(tag)]


def test_the_table_names_every_leaf():
    """But for callbacks that are off and have a test file of their name."""
    found = leaves(to_tree(check(compose([str(ROOT / "configs/nano.yaml")]).tree)))
    tested = {f"callbacks.{path.stem.removeprefix('test_')}" for path in (ROOT / "tests/callbacks").glob("test_*.py")}
    assert set(LEAVES) <= found and found - set(LEAVES) <= tested


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, data_cache):
    return Nano(tmp_path_factory.mktemp("settings"), [*data_cache, *QUIET, *SHORT])


@pytest.fixture(scope="module")
def expected(baseline):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run = baseline.run("base")
    return observe(run, output.getvalue())


@pytest.mark.parametrize("key", [key for key, (_, effect) in LEAVES.items() if not effect.startswith(ELSEWHERE)])
def test_moving_a_setting_has_its_effect(baseline, expected, capsys, key):
    value, effect = LEAVES[key]
    run = baseline.run(key, f"{key}={value}")
    captured = capsys.readouterr()
    if effect == REFUSED:
        assert run.code == 2 and captured.err.count("\n") == 1 and str(key).split(".")[-1] in captured.err, captured.err
        return
    assert run.code == 0, captured.err
    assert observe(run, captured.out)[effect] != expected[effect]
