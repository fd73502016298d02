"""data_report.md of a prepared corpus: what was kept and dropped by source and step, with examples and a figure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.plots import save_figure
from dsv3_lightning.common.table import si
from dsv3_lightning.data.cleaning.corpus import clean, plan
from dsv3_lightning.data.config import DataConfig
from dsv3_lightning.data.scale.dump import RATES, Dump, shown
from dsv3_lightning.data.stages.tasks import ALL
from dsv3_lightning.data.text.sources import sources_of
from dsv3_lightning.data.text.store import TokenFile, read_manifest
from dsv3_lightning.data.text.tally import notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, FIGURE = "data_report.md", "data_report.png"
STEPS = ("language", "lines", "quality", "contaminated", "exact", "near", "kept")  # in their order


class SourceReport(NamedTuple):
    """What became of a source. documents, bytes: by reason, with `read` and `kept`. changed: documents by step."""

    documents: dict[str, int]
    bytes: dict[str, int]
    changed: dict[str, int]
    languages: dict[str, int]
    examples: dict[str, list[str]]


def summed(counts: Mapping[str, Any]) -> SourceReport:
    """The counts of both stages of cleaning, added up for a source. counts: as in `Cleaned.counts`."""
    documents, size, changed, languages = (Counter[str]() for _ in range(4))
    examples: dict[str, list[str]] = {}
    for task in counts["clean"]:
        for total, name in ((documents, "documents"), (size, "bytes"), (changed, "changed"), (languages, "languages")):
            total.update(task[name])
        for reason, texts in task["examples"].items():
            examples.setdefault(reason, []).extend(texts)
    joined = counts["join"]
    for total, name in ((documents, "documents"), (size, "bytes")):
        found = dict(joined[name])
        total["kept"] = found.pop("stays", 0)
        total.update(found)
    examples |= joined["examples"]
    return SourceReport(dict(documents), dict(size), dict(changed), dict(languages), examples)


def tokens_by_origin(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, int]]]:
    """Documents and tokens of each origin: {origin: {split: (documents, tokens)}}."""
    found: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in manifest["origins"]}
    for split in manifest["splits"]:
        file = TokenFile(folder, split)
        origins = file.origins()
        sizes = np.bincount(origins, np.diff(file.offsets()), len(found)).astype(np.int64)
        documents = np.bincount(origins, minlength=len(found))
        for number, name in enumerate(found):
            found[name][split] = (int(documents[number]), int(sizes[number]))
    return found


def report(folder: Path, config: DataConfig, jobs: int = 1, keep_dropped: bool = False) -> Path:
    """Writes the report of a prepared folder, with its figure, into it; returns the report's path.

    Cleaning whose results were removed since is done again for its counts. Raises ConfigError.
    """
    manifest, counts = read_manifest(folder), None
    files = sources_of(config)
    if config.cleaning is not None:
        cleaned = clean(plan(config, files), jobs, ALL, keep_dropped)
        assert cleaned is not None  # of all parts
        counts = cleaned.counts
    text = written(
        folder, config, manifest, counts, notes(manifest, len(files), manifest["files_left_out"], config.setting)
    )
    if counts:
        save_figure(figure({name: summed(found) for name, found in counts.items()}), folder / FIGURE)
    write_file(folder / REPORT, text)
    return folder / REPORT


def written(
    folder: Path, config: DataConfig, manifest: Mapping[str, Any], counts: Mapping[str, Any] | None, met: Sequence[str]
) -> str:
    """The report. counts: of cleaning, by source; None without cleaning. met: lines about input that isn't read."""
    sources = {name: summed(found) for name, found in (counts or {}).items()}
    lines = ["# Data report", "", *totals(folder, config, manifest, sources), ""]
    if met:
        lines += ["## Not in the tokens", "", *(f"- {note}" for note in met), ""]
    if sources:
        lines += ["## By step", "", f"![Bytes of each source by what became of them]({FIGURE})", ""]
    for name, source in sources.items():
        lines += [f"### {name}", "", *by_step(source), "", *examples_of(source)]
    if sources:
        lines += [
            "## One dump of Common Crawl",
            "",
            "What cleaning one dump (2.7 billion pages, 386 TiB of HTML) takes at the rates that "
            "benchmarks/cleaning.py measured:",
            "",
            *(f"    {line}".rstrip() for line in shown(Dump(), RATES).splitlines()),
        ]
    return "\n".join(lines).rstrip() + "\n"


def totals(
    folder: Path, config: DataConfig, manifest: Mapping[str, Any], sources: Mapping[str, SourceReport]
) -> list[str]:
    rows = [["source", "documents", "of them validation", "tokens", "bytes", "bytes per token", "language", "license"]]
    for name, splits in tokens_by_origin(folder, manifest).items():
        documents, tokens = (sum(counts[part] for counts in splits.values()) for part in (0, 1))
        size = sources[name].bytes["kept"] if name in sources else text_bytes(manifest, name)
        given = (config.sources or {}).get(name)
        rows.append([
            name, f"{documents:,}", f"{splits['validation'][0]:,}", f"{tokens:,}", si(size, "B") if size else "",
            f"{size / tokens:.2f}" if size and tokens else "", (given and given.language) or "",
            (given and given.license) or "",
        ])  # fmt: skip
    return markdown(rows)


def text_bytes(manifest: Mapping[str, Any], origin: str) -> int | None:
    """UTF-8 bytes of an origin's text, where the manifest has them."""
    found = [
        splits[origin]["text_bytes"] for splits in manifest.get("splits_by_origin", {}).values() if origin in splits
    ]
    return sum(found) if found else None


def by_step(source: SourceReport) -> list[str]:
    rows = [["step", "documents", "share", "bytes", "share"]]
    order = sorted(
        (name for name in source.documents if name != "read"), key=lambda name: (STEPS.index(step_of(name)), name)
    )
    for name in ["read", *order]:
        documents, size = source.documents[name], source.bytes.get(name, 0)
        label = name if name in ("read", "kept") else f"dropped: {name}"
        rows.append([
            label, f"{documents:,}", share(documents, source.documents["read"]), si(size, "B"),
            share(size, source.bytes["read"]),
        ])  # fmt: skip
    found = [f"{number:,} by {step}" for step, number in source.changed.items()]
    changed = [f"Documents that were changed: {', '.join(found) or 'none'}."]
    languages = sorted(source.languages.items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"{language} {number:,}" for language, number in languages[:10])
    return [*markdown(rows), "", *changed, f"Languages: {shown}."]


def step_of(reason: str) -> str:
    return reason.split(":")[0]


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def examples_of(source: SourceReport) -> list[str]:
    lines = []
    for reason, texts in sorted(source.examples.items()):
        lines += [f"Examples of {reason}:", "", *(f"- `{text.replace('`', chr(39))}`" for text in texts[:3]), ""]
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first column is text and whose others are numbers."""
    head, *body = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [head, f"| --- |{' ---: |' * (len(rows[0]) - 1)}", *body]


def figure(sources: Mapping[str, SourceReport]) -> "Figure":
    """Bars of each source's bytes, cut into what was kept and what each step dropped."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 1.5 + 0.5 * len(sources)), layout="constrained")
    axes = drawn.add_subplot()
    names = list(sources)
    left = np.zeros(len(names))
    for step in ("kept", *STEPS[:-1]):
        sizes = np.array([
            sum(size for reason, size in source.bytes.items() if step_of(reason) == step) for source in sources.values()
        ], float)  # fmt: skip
        if sizes.any():
            axes.barh(names, sizes / 1e6, left=left / 1e6, label=step if step == "kept" else f"dropped: {step}")
        left += sizes
    axes.set(xlabel="MB of text")
    axes.invert_yaxis()
    drawn.legend(loc="outside lower center", ncols=4, fontsize="small")
    return drawn
