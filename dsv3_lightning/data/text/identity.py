"""What prepared data were made of, compared: which input changed. Imports no torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dsv3_lightning.data.config import PACKAGE, DataConfig, is_pattern, is_url
from dsv3_lightning.data.text.store import MANIFEST, read_manifest

SHOWN = 3  # changes that a message names


def key_of(inputs: dict[str, Any]) -> str:
    """The name of the folder with what is made of these inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def is_here(path: str) -> bool:
    """Whether a path of the settings is one of this machine's files, not an installed package, a pattern or a URL."""
    return not (path.startswith(PACKAGE) or is_url(path) or is_pattern(path))


def gone(config: DataConfig) -> str | None:
    """The first text of a config, or its tokenizer, that no longer exists, with the setting's name."""
    paths = {"data.paths": config.paths}
    paths |= {f"data.sources.{name}.paths": source.paths for name, source in (config.sources or {}).items()}
    given = [(key, path) for key, found in paths.items() for path in found if is_here(path)]
    given += [("data.tokenizer", config.tokenizer)] if config.tokenizer is not None else []
    return next((f"{key}: {path}" for key, path in given if not Path(path).exists()), None)


def changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Which inputs differ, the first few in words; empty if none do."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))  # as a manifest holds them
    before, after = ({(name, origin): rest for name, origin, *rest in inputs["files"]} for inputs in (old, new))
    found = [f"{name} changed" for (name, origin) in before if before[name, origin] != after.get((name, origin))
             and (name, origin) in after]  # fmt: skip
    found += [f"{name} is gone" for name, origin in before if (name, origin) not in after]
    found += [f"{name} is new" for name, origin in after if (name, origin) not in before]
    if not found and old["files"] != new["files"]:
        found.append("the order of data.paths")
    for key in [*old, *(key for key in new if key not in old)]:
        if key != "files" and old.get(key) != new.get(key):
            plain = not isinstance(old.get(key), list | dict) and not isinstance(new.get(key), list | dict)
            found.append(f"{key}: {old.get(key)} before, {new.get(key)} now" if plain else f"the {key} is another")
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def why_again(folder: Path, inputs: dict[str, Any]) -> str | None:
    """Why the data must be prepared again although data of the same texts exist; None if none exist."""
    if folder.exists():
        return f"{folder.name} is damaged, or of another version"
    names = {(name, origin) for name, origin, *_ in inputs["files"]}
    for manifest in sorted(folder.parent.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            others = read_manifest(manifest.parent)["inputs"]
            if names & {(name, origin) for name, origin, *_ in others["files"]}:
                return f"since {manifest.parent.name} was made: {changes(others, inputs)}"
        except (OSError, ValueError, KeyError, TypeError):  # of another version
            continue
    return None
