"""Paths that users give mean one thing everywhere."""

import argparse
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from dsv3_lightning import cli
from dsv3_lightning.common.paths import display_path, expand_home, path_argument, user_path
from dsv3_lightning.config.compose import compose
from dsv3_lightning.config.overrides import text_override
from dsv3_lightning.config.schema import Config, check, to_tree
from dsv3_lightning.errors import ConfigError
from tests.conftest import Nano

# Every flag, word and setting that holds text and no path. A new one that is a path must be of the paths' type.
TEXTS = {
    "top-level": {"words"},
    "run, validate, prepare, plan": {"words"},  # files and presets by name, which config/compose.py finds
    "plan": {"gpu", "times"},  # numbers, or a run
    "generate": {"prompt"},
    "chat": {"system"},
    "prepare": {"shard"},
    "data": {"source"},
    "sample": {"reward"},  # module:function
    "eval": {"names"},
    "evaluate": {"tasks"},  # files, or names in a folder, which evaluation/tasks.py finds
    "serve": {"name", "host", "api_key", "cors_origin"},
    "generate, chat": {"stop"},
    "sweep": {"words"},
    "reproduce": {"overrides"},
}
TEXT_SETTINGS = {
    "run.name", "data.text_key", "data.end_token", "data.cleaning.quality", "data.sources", "data.sources.filters",
    "data.sources.language", "data.sources.license", "data.sources.text_key", "data.tokenizer_weights",
    "data.weights_schedule.weights", "grpo.rewards",
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a working folder next to it."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_path_is_relative_to_the_working_folder_or_to_a_home(home: Path):
    here = Path.cwd()
    assert user_path("~") == home and user_path("~/a b/ü") == home / "a b/ü"
    assert user_path("a~/~") == here / "a~/~" and user_path("./~/x") == here / "~/x"
    assert user_path("~root/x") == Path("/root/x") and user_path("/x") == Path("/x")
    assert user_path(user_path("~/x")) == home / "x"
    assert user_path("..") == here.parent and user_path(".").name == "here"


def test_links_keep_their_names_and_their_parent_is_that_of_what_they_point_to(home: Path):
    (home / "deep/folder").mkdir(parents=True)
    Path("link").symlink_to(home / "deep/folder")
    assert user_path("link/x") == Path.cwd() / "link/x"
    assert user_path("link/../x") == home / "deep/x"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("", "empty"), ("  ", "empty"), ("a\0b", "NUL"), ("~no-such-user/x", "home"),
        ("x" * 256, "too long"), (f"a/{'ü' * 128}/b", "too long"), ("x/" * 2100, "too long"),
    ],
)  # fmt: skip
def test_what_can_be_no_path_is_refused(wrong: str, why: str):
    with pytest.raises(ConfigError, match=why):
        user_path(wrong)
    with pytest.raises(argparse.ArgumentTypeError, match=why):
        path_argument(wrong)


def test_the_longest_names_that_a_file_system_takes_are_paths(home: Path):
    user_path("x" * 255).touch()
    user_path("ü" * 127).touch()


def test_messages_show_what_lies_below_the_working_folder_in_short(home: Path):
    assert display_path(Path.cwd() / "runs/x") == "runs/x"
    assert display_path(home) == str(home) and display_path(Path.cwd()) == str(Path.cwd())


def test_every_flag_and_word_is_a_path_or_known_to_be_none(monkeypatch: pytest.MonkeyPatch):
    found: list[argparse.Action] = []
    add = argparse.ArgumentParser.add_argument

    def recorded(self: argparse.ArgumentParser, *names: Any, **options: Any) -> argparse.Action:
        found.append(add(self, *names, **options))
        return found[-1]

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", recorded)
    paths = 0
    for verb in cli.VERBS:
        found.clear()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(None):
            cli.main([verb, "--help"])
        allowed = set().union(*(names for verbs, names in TEXTS.items() if verb in verbs or verbs == "top-level"))
        for action in found:
            takes_text = action.nargs != 0 and action.choices is None and action.type in (None, str)
            assert not takes_text or action.dest in allowed, (
                f"dsv3 {verb}: {action.dest} is neither a path nor known text"
            )
            paths += action.type is path_argument
    assert paths >= 20


def leaves(hint: Any, key: str) -> list[tuple[str, Any]]:
    """Every type below a settings class that is no container, with its dotted key."""
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        return [leaf for name, inner in hints.items() for leaf in leaves(inner, f"{key}.{name}".lstrip("."))]
    if get_origin(hint) is Annotated or not get_args(hint) or key.split(".")[0] in ("trainer", "strategy", "callbacks"):
        return [(key, hint)]
    return [leaf for inner in get_args(hint) for leaf in leaves(inner, key)]


def test_every_setting_that_is_text_is_a_path_or_known_to_be_none():
    found = leaves(Config, "")
    assert {key for key, hint in found if hint is str and "." in key} == TEXT_SETTINGS
    marked = {key for key, hint in found if get_origin(hint) is Annotated}
    assert marked == {
        "run.dir",
        "run.resume",
        "init_from",
        "data.paths",
        "data.cache_dir",
        "data.tokenizer",
        "data.sources.paths",
        "data.sources.tokenizer",
        "data.cleaning.decontaminate.paths",
        "compute.compile_cache",
    }


def test_settings_are_resolved_and_stay_as_they_are_when_read_again(home: Path):
    words = ["run.dir=~/runs", "run.resume=~/x.ckpt", "data.paths=[~/a, b c, package:json]", "data.cache_dir=cache"]
    callback = "callbacks.mine={class_path: a.B, init_args: {dirpath: ~/saved, deep: [{file: ~/y}], text: a ~/b}}"
    config = check(compose(["nano"], [*words, "data.tokenizer=~/t", callback]).tree)
    here = Path.cwd()
    assert (config.run.dir, config.run.resume) == (f"{home}/runs", f"{home}/x.ckpt")
    assert config.data.paths == [f"{home}/a", f"{here}/b c", "package:json"]
    assert (config.data.cache_dir, config.data.tokenizer) == (f"{here}/cache", f"{home}/t")
    arguments = config.callbacks["mine"]["init_args"]
    assert arguments == {"dirpath": f"{home}/saved", "deep": [{"file": f"{home}/y"}], "text": "a ~/b"}
    assert check(to_tree(config)) == config
    assert expand_home({"prompts": ["~/x"]}) == {"prompts": ["~/x"]}


def test_files_of_settings_are_found_in_the_home_folder(home: Path):
    (home / "mine.yaml").write_text("defaults: [nano]\nrun: {dir: ~/runs}\n")
    Path("outer.yaml").write_text("defaults: [~/mine]\n")
    assert check(compose(["outer.yaml"]).tree).run.dir == check(compose(["~/mine.yaml"]).tree).run.dir == f"{home}/runs"


@pytest.mark.parametrize("name", ["a b", "x: y #z", "[1, 2]", "010", "${oc.env:HOME}", "q\"u'o", "\\t", "ü, 数据"])
def test_an_override_made_for_a_path_is_that_path(home: Path, name: str):
    assert check(compose(["nano"], [text_override("run.dir", f"{home}/{name}")]).tree).run.dir == f"{home}/{name}"


def test_a_run_below_the_home_folder_is_in_one_place_and_resumes(nano: Nano, monkeypatch: pytest.MonkeyPatch):
    """By `~` on the command line, with a variable's name in the run's: all files of it lie in one folder."""
    home, here = nano.base / "home", nano.base / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    small = [
        "run.dir=~/runs",
        "run.name=a $HOME",
        "callbacks.checkpoint.every_n_steps=2",
        "trainer.limit_val_batches=0",
    ]
    assert nano.run("x", *small, "trainer.max_steps=2").code == 0
    run = home / "runs/a $HOME"
    assert {"config.yaml", "tokenizer.json", "report.md", "checkpoints"} <= set(os.listdir(run))
    assert list(run.glob("events*")) and not os.listdir(here)
    report = (run / "report.json").read_bytes()
    assert nano.run("x", *small, "trainer.max_steps=2").code == 0  # is finished
    assert (run / "report.json").read_bytes() == report
    assert cli.main(["checkpoint", "inspect", "~/runs/a $HOME/checkpoints/step=2.ckpt"]) == 0
    assert cli.main(["compare", "~/runs/a $HOME", "--markdown", "~/t.md"]) == 0 and (home / "t.md").is_file()
