"""Cached preparation of token files: the same inputs and settings reuse the existing files. Imports no torch.

The result is in `cache_dir/KEY`, where KEY is a hash of the inputs' content and of the settings that affect the files.
It is built under another name and renamed when everything is on disk, so a folder of that name is complete.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dsv3_lightning.common.files import digest, remove, remove_leftovers, utf8_path, whole
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.data.cleaning.corpus import Cleaned, Plan, clean, plan, read_facts
from dsv3_lightning.data.config import DEFAULTS, LARGEST_VOCABULARY, DataConfig
from dsv3_lightning.data.stages.tasks import ALL, Shard, is_held, present
from dsv3_lightning.data.text.build import Build, others_have_work, summary
from dsv3_lightning.data.text.digests import Digests, described
from dsv3_lightning.data.text.documents import Files
from dsv3_lightning.data.text.identity import changes, gone, key_of, why_again
from dsv3_lightning.data.text.progress import say
from dsv3_lightning.data.text.sources import Source, sources_of
from dsv3_lightning.data.text.store import FORMAT, is_complete, read_manifest
from dsv3_lightning.data.text.tally import listed, notes
from dsv3_lightning.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer, check_end
from dsv3_lightning.errors import ConfigError


def prepare(
    config: DataConfig,
    known: dict[str, Any] | None = None,
    tell: Callable[[str], None] | None = say,
    jobs: int = 1,
    shard: Shard = ALL,
    keep_dropped: bool = False,
) -> Path:
    """The folder with the token files, built if need be; several processes may call it at the same time.

    known: what the data of a run that resumes were made of, as a manifest's `inputs`. Others are refused before
    anything is written. If texts or tokenizer are gone, the tokens prepared from them are used.
    tell: called with one line for each kind of input that isn't in the token files.
    jobs: processes that work at the same time. shard: the part of the work that is this call's; RunStopped with code 0
        says that the other parts are still to be done. keep_dropped: write what cleaning drops beside what stays.
    Raises ConfigError for inputs that can't be read, hold no text, or need ids at or above `data.vocab_size`.
    """
    if known is not None and (lost := gone(config)) is not None:
        return prepared_before(config, known, lost, tell)
    tokenizer = None
    if config.tokenizer is not None:
        try:
            tokenizer = Tokenizer.from_file(config.tokenizer)
        except ConfigError as error:
            raise ConfigError(f"data.tokenizer: {error}") from error
        tokenizer = tokenizer.ending_with(config.end_token)
    elif config.end_token is not None:
        check_end(config.end_token, SPECIAL_TOKENS)
    if tokenizer is None and config.vocab_size > LARGEST_VOCABULARY:
        raise ConfigError(
            f"data.vocab_size={config.vocab_size}: a tokenizer is trained up to {LARGEST_VOCABULARY:,}; data.tokenizer "
            "names a larger one"
        )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"data.vocab_size={config.vocab_size}: the ids of data.tokenizer={config.tokenizer} go up to "
            f"{tokenizer.vocab_size - 1}; needs at least {tokenizer.vocab_size}"
        )
    left_out: Counter[str] = Counter()
    sources = sources_of(config, left_out)
    inputs = describe_inputs(config, sources, tokenizer)
    cleaning = plan(config, sources) if config.cleaning is not None else None
    if cleaning is not None:
        inputs["cleaning"] = cleaning.key
    if known is not None and (differing := changes(known, inputs)):
        raise ConfigError(f"data: this run's were made of other inputs ({differing}); choose another run.name")
    folder = user_path(config.cache_dir) / key_of(inputs)
    if not is_complete(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder) if shard == ALL else nullcontext():
                if not is_complete(folder):  # another process may have finished it in the meantime
                    kept, met = sources, None
                    if cleaning is not None:
                        kept, counts = cleaned_files(cleaning, jobs, shard, keep_dropped)
                        met = read_facts(counts)
                    work = work_folder(folder)
                    build = Build(work, config, Files.of(kept, config), tokenizer, jobs, shard)
                    build_whole(folder, build, len(sources), left_out, inputs, met)
        except OSError as error:
            raise ConfigError(f"data.cache_dir={config.cache_dir}: {error.strerror or error}") from error
    elif (work := work_folder(folder)) in unfinished(folder.parent):  # of a process that was killed at its very end
        with suppress(OSError):  # another user's, who will remove it
            remove(work)
    if tell is not None:
        for line in notes(read_manifest(folder), len(sources), left_out, config.setting):
            tell(line)
    return folder


def cleaned_files(cleaning: Plan, jobs: int, shard: Shard, keep_dropped: bool) -> Cleaned:
    """What stays of each source. Raises ConfigError if nothing stays of one.

    Raises RunStopped with code 0 if other jobs have tasks left to do.
    """
    cleaned = clean(cleaning, jobs, shard, keep_dropped)
    if cleaned is None:
        raise others_have_work("cleaning", shard)
    for name, counts in cleaned.counts.items():
        if not counts["join"]["documents"].get("stays"):
            reasons: Counter[str] = Counter(counts["join"]["documents"])
            for part in counts["clean"]:
                reasons.update({reason: n for reason, n in part["documents"].items() if reason not in ("read", "kept")})
            raise ConfigError(f"data.cleaning: no document of {name} is left ({listed(reasons) or 'it has none'})")
    return cleaned


def prepared_before(config: DataConfig, known: dict[str, Any], lost: str, tell: Callable[[str], None] | None) -> Path:
    """The folder with what was made of these inputs. lost: which of them is gone. Raises ConfigError."""
    folder = user_path(config.cache_dir) / key_of(known)
    if not is_complete(folder):
        raise ConfigError(
            f"{lost} does not exist, nor does {utf8_path(folder)} with the tokens made from it; "
            "set data.paths to where the texts are now, or data.cache_dir to where the tokens are"
        )
    if tell is not None:
        tell(f"{lost} does not exist; the tokens made from it are used: {utf8_path(folder)}")
    return folder


def work_folder(folder: Path) -> Path:
    """Where the stages of a folder's preparation keep what they have done until it is complete."""
    return folder.with_name(f"{folder.name}.work")


def unfinished(cache: Path) -> list[Path]:
    """The work folders of preparations that stopped, and at which no process is at work."""
    return [path for path in sorted(cache.glob("*.work")) if not any(map(is_held, path.glob("job-*.lock")))]


def build_whole(
    folder: Path,
    build: Build,
    files_read: int,
    left_out: Mapping[str, int],
    inputs: dict[str, Any],
    met: Mapping[str, Any] | None,
) -> None:
    """Builds the folder, which appears only when complete. Only one process at a time may call this for each shard.

    met: as in `Build.put_together`.
    """
    begun = time.monotonic()
    if not build.work.exists() and (reason := why_again(folder, inputs)):
        say(f"data are prepared again, {reason}")
    for other in unfinished(folder.parent):
        if other != build.work:
            say(f"{utf8_path(other)} is an unfinished preparation of other files or settings; it may be removed")
    build.work.mkdir(parents=True, exist_ok=True)
    with present(build.work, build.shard):
        encoded = build.encode(files_read)
        with locked(folder) if build.shard != ALL else nullcontext():
            if not is_complete(folder):  # another job may have put it together in the meantime
                remove_leftovers(folder.parent, folder.name)
                with whole(folder) as beside:
                    manifest = build.put_together(beside, encoded, files_read, left_out, inputs, met)
                say(summary(manifest, folder, time.monotonic() - begun))
    if not any(is_held(path) for path in build.work.glob("job-*.lock")):
        remove(build.work)


def describe_inputs(config: DataConfig, sources: list[Source], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Everything that determines the files' content, and nothing else, such as batch size, order or sequence length."""
    files = []
    digests = Digests(user_path(config.cache_dir) / "digests.json")
    for source in sources:
        name, size, sha256 = described(source, digests)
        files.append([name, source.origin, size, sha256])
    digests.save()
    trained = config.vocab_size if config.end_token is None else [config.vocab_size, config.end_token]
    keys = {name: source.text_key for name, source in (config.sources or {}).items() if source.text_key is not None}
    kinds = {
        name: [source.kind, source.tokenizer and digest(Path(source.tokenizer))]
        for name, source in (config.sources or {}).items()
        if source.kind != "auto" or source.tokenizer
    }
    made: dict[str, Any] = {}  # without settings at their defaults, so that what older versions made is found
    if config.fim_rate or config.split_rate:
        made["rewriting"] = [config.fim_rate, config.split_rate, config.seed]
    names = ["shard_bytes", "max_document_bytes"]
    names += ["tokenizer_bytes", "tokenizer_weights", "pretokenization"] if tokenizer is None else []
    made |= {name: getattr(config, name) for name in names if getattr(config, name) != DEFAULTS[name]}
    return {
        "format": FORMAT,
        "files": files,
        "text_key": config.text_key,
        **({"text_keys": keys} if keys else {}),
        **({"kinds": kinds} if kinds else {}),
        "skip_bad_lines": config.skip_bad_lines,
        "validation_fraction": config.validation_fraction,
        "tokenizer": [*tokenizer.names, tokenizer.sha256, *tokenizer.text_tokens()] if tokenizer else trained,
        **made,
    }


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock file next to the folder; the operating system releases it if the process dies."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that prepares {utf8_path(folder)}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
