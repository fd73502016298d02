"""Claims that a command of its own measures, as rows of docs/reproduction.md beside those of the experiments."""

import datetime
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsv3_lightning.common.files import write_file
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.studies.claims import verdict
from dsv3_lightning.studies.compare import spread

FILE = "claims.json"


@dataclass(frozen=True)
class Measured:
    """The inequality low < high between two sides that have a value for each seed, or are one number.

    command, date, device: what measured it, when and where. form: how a value is printed, as for str.format.
    """

    text: str
    source: str
    published: str
    low: list[float] | float
    high: list[float] | float
    form: str
    command: str
    date: str
    device: str

    def row(self) -> list[str]:
        """The row of the table of claims.

        >>> Measured("a", "b", "c", 0.1, [0.2, 0.3, 0.25], "{:.2f}", "", "", "").row()
        ['a', 'b', 'c', '0.10 against 0.25 ± 0.05', '**reproduced**']
        """
        sides = self.low, self.high
        seeds = max(len(side) for side in sides if isinstance(side, list))
        low, high = (side if isinstance(side, list) else [side] * seeds for side in sides)
        texts = [spread(side, self.form) if isinstance(side, list) else self.form.format(side) for side in sides]
        found = verdict([most - least for least, most in zip(low, high, strict=True)])
        return [self.text, self.source, self.published, " against ".join(texts), f"**{found}**"]


def made_by(script: str, seeds: Sequence[int]) -> tuple[str, str, str]:
    """The command, date and device of what a script measures now with these seeds, on one thread of this machine."""
    return (
        f"python {script} --seeds {' '.join(map(str, seeds))}",
        datetime.date.today().isoformat(),
        f"1 x cpu, {platform.machine()}, 1 thread ({platform.system()}), torch {version('torch')}",
    )


def results_of(folder: Path, seeds: Sequence[int], measure: Callable[[Path, int], Any]) -> Iterator[Any]:
    """Yields what `measure` finds for each seed in its folder. A result is stored there, and read when it exists."""
    for seed in seeds:
        stored = folder / f"seed{seed}/result.json"
        if not stored.exists():
            write_file(stored, json.dumps(measure(stored.parent, seed), indent=1) + "\n")
        yield json.loads(stored.read_text(encoding="utf-8"))


def write_measured(folder: Path, claims: Sequence[Measured]) -> None:
    """Writes the claims to the folder, in which `dsv3 reproduce --dir` looks for them. Raises WriteError."""
    write_file(folder / FILE, json.dumps([asdict(one) for one in claims], indent=1) + "\n")


def read_measured(folder: Path) -> list[Measured]:
    """All claims in folders of this one, by their folders' names. Raises ConfigError for a file of another form."""
    found: list[Measured] = []
    for path in sorted(folder.glob(f"*/{FILE}")):
        try:
            content: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
            found += [Measured(**fields) for fields in content]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}: is no list of measured claims ({error})") from error
    return found
