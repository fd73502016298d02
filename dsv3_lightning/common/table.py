"""Numbers and tables in plain text, the same on a terminal, in a pipe and in a log."""

from collections.abc import Collection, Sequence

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def si(value: float, unit: str) -> str:
    """A number with four digits and a decimal prefix: si(15_960_108_544, "B") is "15.96 GB"."""
    power = 0
    while abs(value) >= 999.95 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.4g} {PREFIXES[power]}{unit}".rstrip()


def table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table with columns as wide as their widest cell. left: columns aligned left; the others are aligned right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        aligned = [f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)
