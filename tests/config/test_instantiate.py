"""Objects from settings: callbacks of any origin, Trainer arguments, strategies; each complaint in one line."""

import sys
from dataclasses import replace
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

from dsv3_lightning import callbacks as ours
from dsv3_lightning.common.wording import either
from dsv3_lightning.config.checks import check_callbacks
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.instantiate import (
    OUR_CALLBACKS,
    build_callbacks,
    build_strategy,
    build_trainer_arguments,
    check_objects,
)
from dsv3_lightning.config.schema import Config, check
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.parallel.mesh import KINDS

MODULE = """
from typing import Any
from lightning.pytorch import Callback
class Mine(Callback):
    def __init__(self, speed: float, n: int = 3, pairs: list[tuple[float, float]] = [], until: "int | None" = None):
        if speed < 0:
            raise ValueError("speed must be\\nat least 0")
        self.speed, self.n, self.pairs, self.until = speed, n, pairs, until
class Child(Mine):
    def __init__(self, *, name: str = "x", **kwargs):
        super().__init__(**kwargs)
        self.name = name
class Wide(Callback):
    def __init__(
        self, flag: "bool | str", count: "int | str | None" = None, anything: Any = None, maybe: "str | None" = "x",
        each: "list[int | str]" = [], inner: "Callback | None" = None,
    ):
        self.flag, self.count, self.anything, self.maybe = flag, count, anything, maybe
        self.each, self.inner = each, inner
class Untyped(Callback):
    def __init__(self, x, y=3):
        self.x, self.y = x, y
"""


@pytest.fixture(scope="module", autouse=True)
def module_beside(tmp_path_factory: pytest.TempPathFactory):
    """The current folder holds a module, and is not on sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("project")
        (folder / "beside_the_run.py").write_text(MODULE)
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])  # put back afterwards
        yield


def config(**changes: Any) -> Config:
    return replace(check(compose(["nano"]).tree), **changes)


def mine(block: str) -> Any:
    """The callback that a block of YAML describes."""
    settings = compose([], [f"callbacks.mine={block}"]).tree["callbacks"]
    return build_callbacks(config(callbacks=check_callbacks(settings)))["mine"]


def test_built_in_names_take_their_arguments_directly():
    built = build_callbacks(check(compose(["nano"], ["callbacks.expert_bias={speed: 3e-4, rule: proportional}"]).tree))
    assert type(built["expert_bias"]) is ours.ExpertBias
    assert (built["expert_bias"].speed, built["expert_bias"].rule) == (3e-4, "proportional")


def test_any_callback_can_be_named_by_class_path():
    callback = mine("{class_path: beside_the_run.Child, init_args: {speed: 3e-4, name: '5'}}")
    assert (callback.speed, callback.name) == (3e-4, "5")
    assert mine("{class_path: beside_the_run.Untyped, init_args: {x: [1, a]}}").x == [1, "a"]
    stop = mine("{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss}}")
    assert stop.monitor == "val/loss"
    assert mine("{class_path: lightning.pytorch.callbacks.DeviceStatsMonitor}")  # in place of a built-in one


TEXT = """{class_path: beside_the_run.Wide, init_args: {flag: 'no', count: '010', anything: '1e5', maybe: 'null',
  each: ['1', 'yes', 2], inner: {class_path: beside_the_run.Wide, init_args: {flag: 'on', anything: {x: '~'}}}}}"""


def test_quoted_text_stays_text_whatever_else_its_type_has_room_for():
    """jsonargparse would make False, 10, 100000.0, None, 1, True, True and None of these."""
    wide = mine(TEXT)
    assert (wide.flag, wide.count, wide.anything, wide.maybe) == ("no", "010", "1e5", "null")
    assert wide.each == ["1", "yes", 2]
    assert (wide.inner.flag, wide.inner.anything) == ("on", {"x": "~"})


def test_plain_values_of_the_same_types_are_what_yaml_says():
    block = "{class_path: beside_the_run.Wide, init_args: {flag: false, count: 010, anything: 1e5, maybe: null}}"
    wide = mine(block)
    assert (wide.flag, wide.count, wide.anything, wide.maybe) == (False, 10, 1e5, None)


def test_null_leaves_a_callback_out_and_the_order_is_the_yamls():
    built = build_callbacks(config(callbacks={"progress": {}, "run_report": None, "router_probe": {}}))
    assert list(built) == ["progress", "router_probe"]


def test_building_leaves_the_settings_as_they_were():
    settings = {"mine": {"class_path": "beside_the_run.Mine", "init_args": {"speed": 1, "pairs": [[0, 1]]}}}
    build_callbacks(config(callbacks=settings))
    assert settings["mine"]["init_args"] == {"speed": 1, "pairs": [[0, 1]]}


ARGUMENTS = "speed, n, pairs, until"


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("{speed: abc}", 'callbacks.mine.speed="abc": must be float'),
        ("{speed: '1e5'}", 'callbacks.mine.speed="1e5": must be float'),
        ("{speed: 1, n: '3'}", 'callbacks.mine.n="3": must be int'),
        ("{speed: true}", "callbacks.mine.speed=true: must be float"),
        ("{}", "callbacks.mine.speed: missing"),
        ("{speed: 1, sped: 2}", "callbacks.mine.sped: no such argument of Mine; did you mean speed?"),
        ("{speed: 1, zzz: 2}", f"callbacks.mine.zzz: no such argument of Mine; valid: {ARGUMENTS}"),
        ("{speed: 1, n: 2.5}", "callbacks.mine.n=2.5: must be int"),
        ("{speed: 1, until: x}", 'callbacks.mine.until="x": must be one of int, null'),
        (
            "{speed: 1, pairs: [[0, 1], [0.5, x]]}",
            'callbacks.mine.pairs=[[0, 1], [0.5, "x"]]: Expected a float. Got value: x',
        ),
        ("{speed: -1}", "callbacks.mine: speed must be at least 0"),
        (
            "{class_path: beside_the_run.Mine, init_args: {speed: a}}",
            'callbacks.mine.init_args.speed="a": must be float',
        ),
        (
            "{class_path: beside_the_run.Child, init_args: {speed: 1, nmae: 3}}",
            "callbacks.mine.init_args.nmae: no such argument of Child; did you mean name?",
        ),
        (
            "{class_path: beside_the_run.Mine, speed: 1}",
            "callbacks.mine.speed: not valid next to class_path; arguments go under init_args",
        ),
        (
            "{class_path: beside_the_run.Mine, init_args: 3}",
            "callbacks.mine.init_args=3: must be a section of arguments",
        ),
        ("{class_path: no_such.Thing}", "callbacks.mine.class_path=\"no_such.Thing\": No module named 'no_such'"),
        (
            "{class_path: beside_the_run.Thing}",
            "callbacks.mine.class_path=\"beside_the_run.Thing\": module 'beside_the_run' has no attribute 'Thing'",
        ),
        (
            "{class_path: Thing}",
            'callbacks.mine.class_path="Thing": must be the full name of a class, such as package.module.Class',
        ),
        (
            "{class_path: json.JSONDecoder}",
            'callbacks.mine.class_path="json.JSONDecoder": is not a Callback (lightning.pytorch.callbacks.callback)',
        ),
    ],
)
def test_a_wrong_block_is_reported_in_one_line(block: str, expected: str):
    if not block.startswith("{class_path"):  # arguments
        block = f"{{class_path: beside_the_run.Mine, init_args: {block}}}"
        expected = expected.replace("callbacks.mine", "callbacks.mine.init_args", 1)
    with pytest.raises(ConfigError) as caught:
        mine(block)
    assert str(caught.value) == expected


def test_trainer_arguments_are_lightnings_own_and_typed():
    trainer = config().trainer
    assert build_trainer_arguments(config()) == trainer  # nothing of the user's is lost, precision stays text
    profiler = {"class_path": "lightning.pytorch.profilers.SimpleProfiler"}
    built = build_trainer_arguments(config(trainer=trainer | {"profiler": profiler, "detect_anomaly": False}))
    assert type(built["profiler"]).__name__ == "SimpleProfiler"


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("detect_anomaly", 3, "trainer.detect_anomaly=3: must be bool"),
        ("limit_val_batch", 3, "trainer.limit_val_batch: no such argument of Trainer; did you mean limit_val_batches?"),
        ("deterministic", "x", "trainer.deterministic=\"x\": must be one of bool, 'warn', null"),
        (
            "profiler",
            {"class_path": "no.Such"},
            'trainer.profiler={"class_path": "no.Such"}: '
            "Problem with given class_path 'no.Such': No module named 'no'",
        ),
    ],
)
def test_a_wrong_trainer_argument_is_reported_in_one_line(argument: str, value: Any, expected: str):
    with pytest.raises(ConfigError) as caught:
        check_objects(config(trainer=config().trainer | {argument: value}))
    assert str(caught.value) == expected


def test_a_strategy_is_lightnings_name_or_a_class():
    assert [build_strategy(config(strategy=name)) for name in ("auto", "ddp")] == ["auto", "ddp"]
    block = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"find_unused_parameters": False}}
    assert isinstance(build_strategy(config(strategy=block)), DDPStrategy)
    for strategy, expected in (
        ("dpp", 'strategy="dpp": no such strategy; did you mean ddp?'),
        ({"kind": "x"}, f'strategy.kind="x": must be {either(KINDS)}'),
    ):
        with pytest.raises(ConfigError) as caught:
            build_strategy(config(strategy=strategy))
        assert str(caught.value) == expected


def test_a_dispatcher_of_ones_own_takes_tokens_to_their_experts():
    block = {"kind": "fsdp2_ep", "dispatcher": "benchmarks.scaling.AllGather"}
    assert build_strategy(config(strategy=block)).dispatcher.__name__ == "AllGather"
    for name, expected in (
        ("json.JSONDecoder", "is not a Dispatcher (dsv3_lightning.model.dispatch)"),
        ("deep_ep.Exchange", "No module named 'deep_ep'"),
    ):
        with pytest.raises(ConfigError) as caught:
            build_strategy(config(strategy=block | {"dispatcher": name}))
        assert str(caught.value) == f'strategy.dispatcher="{name}": {expected}'


def test_every_preset_names_objects_that_exist():
    for name in ("nano", "laptop", "v2-lite", "moonlight", "v3", "llm-7b", "llm-67b"):
        check_objects(check(compose([name]).tree))


def test_our_callbacks_have_one_name(monkeypatch: pytest.MonkeyPatch):
    """From a checkout's top folder `callbacks.…` works as well, and would be a second class object."""
    monkeypatch.syspath_prepend(str(OUR_CALLBACKS.parent))
    with pytest.raises(ConfigError) as caught:
        mine("{class_path: callbacks.expert_bias.ExpertBias, init_args: {speed: 1}}")
    for name in [name for name in sys.modules if name.split(".")[0] == "callbacks"]:
        del sys.modules[name]
    assert str(caught.value) == (
        'callbacks.mine.class_path="callbacks.expert_bias.ExpertBias": '
        "write dsv3_lightning.callbacks.expert_bias.ExpertBias, or the class exists twice"
    )
