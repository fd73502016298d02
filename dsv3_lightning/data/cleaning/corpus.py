"""Cleaning of all sources of a corpus. The files of cleaned documents are read like any others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_lightning.common.files import digest, utf8_path
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.data.cleaning import join, stage
from dsv3_lightning.data.cleaning.config import CleaningConfig
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.stages.tasks import ALL, DONE, Counts, Shard, Task, run_tasks, task_folder
from dsv3_lightning.data.text.digests import Digests, described
from dsv3_lightning.data.text.identity import key_of
from dsv3_lightning.data.text.progress import progress
from dsv3_lightning.data.text.sources import Source
from dsv3_lightning.data.text.tally import ReadStats
from dsv3_lightning.errors import ConfigError


class SourcePlan(NamedTuple):
    """What the first stage does to a source. key: a hash of all that determines its result."""

    work: stage.CleanWork
    tasks: list[Task]
    key: str


@dataclass(frozen=True)
class Plan:
    """The work of cleaning a corpus. sources: by name. joins: tasks of the second stage. key: a hash of all of it."""

    cache: Path
    cleaning: CleaningConfig
    sources: dict[str, SourcePlan]
    joins: list[Task]
    key: str


class Cleaned(NamedTuple):
    """A cleaned corpus. files: of the documents that stay. counts: of both stages, by source."""

    files: list[Source]
    counts: dict[str, dict[str, Any]]


def plan(config: DataConfig, files: Sequence[Source]) -> Plan:
    """The work of cleaning the files of all sources, without doing it. Raises ConfigError for what can't be read."""
    assert config.cleaning is not None and config.sources is not None
    cache = user_path(config.cache_dir)
    sets, digests = digests_of_sets(config.cleaning), Digests(cache / "digests.json")
    sources = {}
    for name, given in config.sources.items():
        found = [source for source in files if source.origin == name]
        key = given.text_key or config.text_key
        most = config.max_document_bytes
        work = stage.CleanWork(given, config.cleaning, key, config.skip_bad_lines, most, found)
        tasks = stage.cut([described(source, digests) for source in found])
        sources[name] = SourcePlan(work, tasks, key_of({"settings": stage.decisive(work, sets), "tasks": tasks}))
    digests.save()
    joins: list[Task] = [
        {"parts": [join.part_name(name, number) for name in names for number in range(len(sources[name].tasks))]}
        for names in ([list(sources)] if config.cleaning.scope == "global" else [[name] for name in sources])
    ]
    keys = {name: source.key for name, source in sources.items()}
    key = key_of({"join": join.decisive(config.cleaning), "sources": keys, "tasks": joins})
    return Plan(cache, config.cleaning, sources, joins, key)


def clean(plan: Plan, jobs: int = 1, shard: Shard = ALL, keep_dropped: bool = False) -> Cleaned | None:
    """Does the work; None if other jobs have tasks left to do. Raises ConfigError.

    What was done before with the same settings, such as another source, is not done again. keep_dropped: write what is
    dropped beside what stays, as `dropped.jsonl.zst`.
    """
    counts: dict[str, dict[str, Any]] = {}
    parts: dict[str, join.Part] = {}
    ending = "-dropped" if keep_dropped else ""
    for name, source in plan.sources.items():
        folder = source_folder(plan, name, ending)
        work = partial(stage.clean_task, source.work, keep_dropped)
        found = run(f"cleaning {name}", folder, source.tasks, work, jobs, shard, False)
        if found is None:
            continue
        counts[name] = {"clean": found}
        for number in range(len(found)):
            part = join.part_name(name, number)
            parts[part] = join.Part(name, part, task_folder(folder, number))
    if len(counts) < len(plan.sources):
        return None
    folder = plan.cache / f"join-{plan.key}{ending}"
    joining = partial(join.join_task, plan.cleaning, parts, keep_dropped)
    found = run("comparing documents", folder, plan.joins, joining, jobs, shard, True)
    if found is None:
        return None
    for joined in found:
        for name, of_source in joined["sources"].items():
            counts[name]["join"] = of_source
    marks = {
        name: task_folder(folder, n) / f"{name}.npy" for n, task in enumerate(plan.joins) for name in task["parts"]
    }
    return Cleaned([join.documents_of(part, marks[name]) for name, part in parts.items()], counts)


def read_facts(counts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Irregularities in the files that were read, over all sources, in the form of `ReadStats.facts`."""
    total = ReadStats().facts()
    for found in counts.values():
        for task in found["clean"]:
            for name, value in total.items():
                total[name] = (
                    value + task[name] if isinstance(value, int) else dict(Counter(value) + Counter(task[name]))
                )
    return total


def source_folder(plan: Plan, name: str, ending: str = "") -> Path:
    """Where the first stage of a source has its tasks."""
    return plan.cache / f"clean-{name}-{plan.sources[name].key}{ending}"


def run(
    label: str, folder: Path, tasks: Sequence[Task], work: Any, jobs: int, shard: Shard, take_over: bool
) -> list[Counts] | None:
    folder.mkdir(parents=True, exist_ok=True)
    if all((task_folder(folder, number) / DONE).exists() for number in range(len(tasks))):
        return run_tasks(folder, tasks, work, jobs, shard, take_over=take_over)
    size = sum(file[2] for task in tasks for file in task.get("files", []))
    with progress(label, size or None) as advance:
        return run_tasks(folder, tasks, work, jobs, shard, take_over=take_over, advance=advance)


def digests_of_sets(cleaning: CleaningConfig) -> list[str]:
    found = []
    for path in cleaning.decontaminate.paths if cleaning.decontaminate else ():
        try:
            found.append(digest(Path(path)))
        except OSError as error:
            raise ConfigError(f"data.cleaning.decontaminate: {utf8_path(path)}: {error.strerror}") from error
    return found
