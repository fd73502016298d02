"""The settings that may change when a run continues, and the effect of a change. docs/resuming.md shows CHANGES.

A run continues either under its own name, whose record of settings must stay true, or under a new name with
`run.resume=PATH`, which begins another run where PATH ends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dsv3_lightning.errors import ConfigError

Tree = dict[str, Any]


class Change(NamedTuple):
    """A rule for the settings or sections `keys` (longest match). road: where they may change. meaning: the effect."""

    keys: tuple[str, ...]
    road: str
    meaning: str


ALWAYS, SAME_DATA, NEW_NAME, NEVER = "always", "with the same content", "under a new name", "never"
SAME_STEPS = ("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "strategy")
CHANGES = (
    Change(("run.name", "run.dir", "run.resume"), ALWAYS, "the run's folder, and the checkpoint that it begins from"),
    Change(
        ("data.cache_dir", "data.num_workers"), ALWAYS, "where prepared data is stored, and how many workers read it"
    ),
    Change(("data.paths", "data.tokenizer"), SAME_DATA, "where the same texts and the same tokenizer are stored"),
    Change(
        ("data.weights_schedule",), NEW_NAME, "the weights of sources from the next step on; earlier ones must stay"
    ),
    Change(SAME_STEPS, ALWAYS, "the same samples in each step, on other devices"),
    Change(("trainer.accumulate_grad_batches",), ALWAYS, "the same samples in each step, in other micro-batches"),
    Change(("trainer.max_time",), ALWAYS, "the time that one start of the command has"),
    Change(("optimizer",), NEW_NAME, "holds from the first step that follows; Adam's moments are kept"),
    Change(("optimizer.kind",), NEVER, "the optimizer's state is another for each kind"),
    Change(("loss",), NEW_NAME, "holds from the first step that follows"),
    Change(("compute.compile_cache",), ALWAYS, "where compiled functions are stored"),
    Change(("dpo", "grpo"), NEVER, "the run would optimize something else; `init_from` starts another one"),
    Change(("compute",), NEW_NAME, "the same losses within rounding, of FP8 too"),
    Change(
        ("trainer.max_steps",),
        NEW_NAME,
        "schedules in shares of the run are those of the new length from the first step that follows; it can't be "
        "below the checkpoint's step",
    ),
    Change(("trainer",), NEW_NAME, "holds from the first step that follows; intervals still count from step 0"),
    Change(("callbacks",), NEW_NAME, "holds from the first step that follows; a new callback starts without a state"),
    Change(("callbacks.skewed_start",), NEVER, "it acts before the first step"),
    Change(("trainer.precision",), NEVER, "it decides what weights are stored in; auto takes the checkpoint's"),
    Change(("init_from",), NEVER, "the weights are those of the checkpoint"),
    Change(("run.seed", "data"), NEVER, "the samples and their order would be others"),
    Change(("model",), NEVER, "the weights would be those of another model; `init_from` can extend it"),
)


def rule(key: str) -> Change:
    """The rule with the longest entry in CHANGES that is the key or a section containing it."""
    fitting = [(len(entry), change) for change in CHANGES for entry in change.keys if f"{key}.".startswith(f"{entry}.")]
    return max(fitting, key=lambda pair: pair[0])[1]


def shown_differences(stored: Tree, tree: Tree, compared: bool = False) -> str:
    """A description of the first few differences not allowed under a run's own name; empty if there are none.

    compared: the contents of the data are compared later, so that their place doesn't matter.
    """
    free = (ALWAYS, SAME_DATA) if compared else (ALWAYS,)
    return shown(differences(stored, tree, lambda key: rule(key).road in free))


def refuse_changes(path: str, stored: Tree, stateful: set[str], tree: Tree, step: int, compared: bool) -> None:
    """Raises ConfigError if a run can't continue from a checkpoint with these settings.

    stored, stateful: its settings, and the keys of its callbacks' states. compared: as in `shown_differences`.
    """
    free = (ALWAYS, NEW_NAME, SAME_DATA) if compared else (ALWAYS, NEW_NAME)
    differing = differences(stored, tree, lambda key: rule(key).road in free)
    differing |= changed_arguments(stored["callbacks"], stateful, tree["callbacks"])
    if differing:
        raise ConfigError(f"run.resume={path}: these settings can't change when a run resumes: {shown(differing)}")
    if step > (max_steps := tree["trainer"]["max_steps"]):
        raise ConfigError(f"run.resume={path}: is of step {step}, beyond trainer.max_steps={max_steps}")


def changed_arguments(stored: Tree, stateful: set[str], callbacks: Tree) -> dict[str, tuple[Any, Any]]:
    """Changed arguments of users' callbacks with state, which may include arguments, as EarlyStopping's patience.

    The state of a Timer isn't restored, so its arguments may change.
    """
    return {
        f"callbacks.{name}.init_args": (old.get("init_args"), new.get("init_args"))
        for name, old in stored.items()
        if old and (new := callbacks.get(name))
        if "class_path" in old and old["class_path"] == new.get("class_path")
        if old.get("init_args") != new.get("init_args")
        if (kind := old["class_path"].rpartition(".")[2]) != "Timer" and any(key.startswith(kind) for key in stateful)
    }


def differences(old: Any, new: Any, free: Callable[[str], bool], key: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old, new)} for every leaf that differs and isn't free; `auto` of what a run keeps fits all."""
    if old == new or (key in ("trainer.precision", "compute.compile") and new == "auto"):
        return {}
    if isinstance(old, dict) and isinstance(new, dict):
        return {
            path: pair
            for name in [*old, *(name for name in new if name not in old)]
            for path, pair in differences(old.get(name), new.get(name), free, f"{key}.{name}".lstrip(".")).items()
        }
    return {} if free(key) else {key: (old, new)}


def shown(differing: dict[str, tuple[Any, Any]]) -> str:
    words = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in list(differing.items())[:4])
    return f"{words} and {len(differing) - 4} more" if len(differing) > 4 else words


def table() -> str:
    """CHANGES in Markdown, for the documentation."""
    rows = [
        f"| {', '.join(f'`{key}`' for key in change.keys)} | {change.road} | {change.meaning} |" for change in CHANGES
    ]
    return "\n".join(["| setting | may change | meaning |", "| --- | --- | --- |", *rows])
