"""Lightning's names and types in settings, so that errors are reported before Lightning is imported.

A test compares them with the installed Lightning.
"""

from typing import Any, Literal

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
STRATEGIES = (
    "auto",
    *(
        f"{ddp}{unused}"
        for ddp in ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
        for unused in ("", "_find_unused_parameters_false", "_find_unused_parameters_true")
    ),
    *("deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload"),
    *("deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme"),
    *("fsdp", "fsdp_cpu_offload", "single_device", "single_tpu", "single_xla", "xla", "xla_debug"),
)
TRAINER_MORE: dict[str, Any] = {  # arguments of the Trainer that a config may have in addition to those of base.yaml
    "benchmark": bool | None,
    "detect_anomaly": bool,
    "deterministic": bool | Literal["warn"] | None,
    "enable_autolog_hparams": bool,
    "gradient_clip_algorithm": Literal["norm", "value"] | None,
    "inference_mode": bool,
    "limit_predict_batches": int | float | None,
    "limit_test_batches": int | float | None,
    "logger": Any,  # true, a block with a class_path, or a list of them
    "max_time": str | dict[str, float] | None,
    "min_steps": int | None,
    "model_registry": str | None,
    "profiler": Literal["simple", "advanced", "pytorch", "xla"] | dict[str, Any] | None,
    "sync_batchnorm": bool,
}
DURATION = r"\d+:\d\d:\d\d:\d\d"
DURATION_PARTS = ("weeks", "days", "hours", "minutes", "seconds", "milliseconds", "microseconds")
