"""Cleaning of all sources of a corpus: its files in, files of what stays out, which are read like any others."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_lightning.common.files import digest, utf8_path
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.data.cleaning import join, stage
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.stages.tasks import ALL, DONE, Counts, Shard, Task, run_tasks, task_folder
from dsv3_lightning.data.text.digests import Digests
from dsv3_lightning.data.text.identity import key_of
from dsv3_lightning.data.text.progress import progress
from dsv3_lightning.data.text.sources import Source, unreadable
from dsv3_lightning.errors import ConfigError


class Cleaned(NamedTuple):
    """A cleaned corpus. files: of the documents that stay. counts: of both stages, by source.

    key: a hash of all that determines the documents and their order.
    """

    files: list[Source]
    counts: dict[str, Any]
    key: str


def clean(
    config: DataConfig,
    sources: Sequence[Source],
    jobs: int = 1,
    shard: Shard = ALL,
    keep_dropped: bool = False,
) -> Cleaned | None:
    """Cleans the files of all sources; None if other jobs have tasks left to do. Raises ConfigError.

    Unchanged sources that were cleaned before with the same settings are not cleaned again. keep_dropped: write what
    is dropped beside what stays.
    """
    assert config.cleaning is not None and config.sources is not None
    cache = user_path(config.cache_dir)
    sets = digests_of_sets(config)
    digests = Digests(cache / "digests.json")
    parts: list[join.Part] = []
    counts: dict[str, Any] = {}
    keys, waiting = {}, False
    for name, given in config.sources.items():
        found = {source.name: source for source in sources if source.origin == name}
        work = stage.CleanWork(
            given, config.cleaning, given.text_key or config.text_key, config.skip_bad_lines, found, keep_dropped
        )
        tasks = stage.cut([described(source, digests) for source in found.values()])
        keys[name] = key_of({"settings": stage.decisive(work, sets), "tasks": tasks})
        folder = cache / f"clean-{name}-{keys[name]}"
        done = run(f"cleaning {name}", folder, tasks, partial(stage.clean_task, work), jobs, shard, False)
        if done is None:
            waiting = True
            continue
        counts[name] = {"clean": done}
        parts += [join.Part(name, f"{name}-{number:05}", task_folder(folder, number)) for number in range(len(tasks))]
    digests.save()
    if waiting:
        return None
    return joined(cache, config, parts, counts, keys, jobs, shard, keep_dropped)


def joined(
    cache: Path,
    config: DataConfig,
    parts: Sequence[join.Part],
    counts: dict[str, Any],
    keys: dict[str, str],
    jobs: int,
    shard: Shard,
    keep_dropped: bool,
) -> Cleaned | None:
    """Does the second stage."""
    assert config.cleaning is not None
    cleaning = replace(config.cleaning, quality={})
    names = [part.name for part in parts]
    tasks: list[Task] = [{"parts": names}]
    if cleaning.scope == "source":
        tasks = [{"parts": [part.name for part in parts if part.source == name]} for name in keys]
    settings = {"format": join.FORMAT, "sources": keys, "tasks": tasks, "exact": cleaning.exact}
    near = cleaning.near and [cleaning.near.buckets, cleaning.near.rows, cleaning.near.ngram]
    key = key_of({**settings, "near": near, **({"keep_dropped": True} if keep_dropped else {})})
    work = join.JoinWork(cleaning, {part.name: part for part in parts}, keep_dropped)
    folder = cache / f"join-{key}"
    done = run("comparing documents", folder, tasks, partial(join.join_task, work), jobs, shard, True)
    if done is None:
        return None
    files = []
    for number, task in enumerate(tasks):
        for name in task["parts"]:
            files.append(join.documents_of(work.parts[name], task_folder(folder, number) / f"{name}.npy"))
        for source, found in done[number]["sources"].items():
            counts[source]["join"] = found
    return Cleaned(files, counts, key)


def run(
    label: str, folder: Path, tasks: Sequence[Task], work: Any, jobs: int, shard: Shard, take_over: bool
) -> list[Counts] | None:
    folder.mkdir(parents=True, exist_ok=True)
    if all((task_folder(folder, number) / DONE).exists() for number in range(len(tasks))):
        return run_tasks(folder, tasks, work, jobs, shard, take_over=take_over)
    size = sum(file[1] for task in tasks for file in task.get("files", []))
    with progress(label, size or None) as advance:
        return run_tasks(folder, tasks, work, jobs, shard, take_over=take_over, advance=advance)


def described(source: Source, digests: Digests) -> tuple[str, int, str]:
    try:
        return source.name, source.path.stat().st_size, digests.of(source.path)
    except OSError as error:
        raise unreadable(source.where, error) from error


def digests_of_sets(config: DataConfig) -> list[str]:
    assert config.cleaning is not None
    found = []
    for path in config.cleaning.decontaminate.paths if config.cleaning.decontaminate else ():
        try:
            found.append(digest(Path(path)))
        except OSError as error:
            raise ConfigError(f"data.cleaning.decontaminate: {utf8_path(path)}: {error.strerror}") from error
    return found
