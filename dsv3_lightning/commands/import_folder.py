"""`dsv3 import`: checks a Hugging Face folder, and writes the YAML of a run that starts from it."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.paths import display_path, path_argument
from dsv3_lightning.config.compose import to_yaml
from dsv3_lightning.data.text.token_names import absent
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.planning.parameters import count_parameters

if TYPE_CHECKING:
    from dsv3_lightning.hub.folder import HubFolder

HEAD = """\
# A run that starts from the weights in {folder}. Complete it, then: dsv3 run {file}
# `model` is that folder's; a context extension may change max_position_embeddings and rope_scaling.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=path_argument, metavar="HF_FOLDER", help="with config.json and safetensors files"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="the YAML to write; default: the folder's name, here"
    )


def run(folder: Path, out: Path | None) -> int:
    """Checks every key and shape from the files' headers alone, even of 671B parameters in seconds."""
    from dsv3_lightning.hub.folder import HubFolder

    source = HubFolder(folder)
    source.audit()
    missing = check_tokenizer(source)
    for note in source.notes:
        print(note)
    target = out if out is not None else Path(f"{source.path.resolve().name}.yaml")
    if target.exists():
        raise ConfigError(f"{target}: already exists; name another file with --out")
    tree = {
        "defaults": ["base"],
        "run": {"name": source.path.resolve().name},
        "init_from": str(source.path.resolve()),
        "model": {name: value for name, value in asdict(source.config).items() if value is not None},
        "data": {"sequence_length": min(source.config.max_position_embeddings, 4096)}
        | ({"tokenizer": "???"} if missing else {}),
        "trainer": {"max_steps": 1000},
        **fitting(source.config),
    }
    text = to_yaml(tree)
    write_file(target, HEAD.format(folder=source.path.resolve(), file=target) + text)
    counts = count_parameters(source.config)
    print(f"{display_path(source.path)}: {len(source.keys)} tensors, all with a place; {counts.total:,} parameters")
    if missing:
        print(missing)
    needed = ", once data.tokenizer is set," if missing else ""
    print(f"{display_path(target)}: written; dsv3 run {display_path(target)}{needed} starts from these weights")
    return 0


def check_tokenizer(source: "HubFolder") -> str | None:
    """Notes ids without a token. Returns a message if there is no tokenizer.json; a bad one raises ConfigError."""
    from dsv3_lightning.hub.tokens import read_tokenizer, vocabulary_note

    file = source.path / "tokenizer.json"
    if not file.exists():
        return absent(file)
    note = vocabulary_note(read_tokenizer(source.path), source.config.vocab_size, file)
    source.notes += [note] if note else []
    return None


def fitting(model: ModelConfig) -> dict[str, dict]:
    """Settings that switch off what this model has no use for."""
    callbacks: dict[str, None] = {}
    if model.topk_method != "noaux_tc" or not model.num_moe_layers:
        callbacks["expert_bias"] = None
    if not model.mtp_depth:
        callbacks["mtp_weight"] = None
    if not model.num_moe_layers:
        callbacks |= dict.fromkeys(("router_monitor", "router_probe"))
    loss = {} if model.num_moe_layers else {"loss": {"balance": "none"}}
    return loss | ({"callbacks": callbacks} if callbacks else {})
