"""The kinds of files that named sources read, by their names' endings."""

from typing import Literal, get_args

Kind = Literal["auto", "text", "code", "jsonl", "html", "warc", "parquet", "megatron"]
PACKED = ("", ".gz", ".zst")

TEXT = (".txt", ".md", ".rst", ".tex")
CODE = tuple(
    ".py .pyi .c .h .cc .cpp .hpp .cu .go .rs .java .kt .scala .js .jsx .ts .tsx .rb .php .pl .pm .lua .r .jl .swift "
    ".cs .m .hs .ml .clj .erl .ex .sh .sql .s .f90 .v .sv .vhd .el .lisp .dart .zig .proto .cmake".split()
)
SUFFIXES: dict[str, tuple[str, ...]] = {
    "text": tuple(name + packed for name in TEXT for packed in PACKED),
    "code": tuple(name + packed for name in CODE for packed in PACKED),
    "jsonl": tuple(".jsonl" + packed for packed in PACKED),
    "html": tuple(name + packed for name in (".html", ".htm") for packed in PACKED),
    "warc": tuple(name + packed for name in (".warc", ".wet") for packed in ("", ".gz")),
    "parquet": (".parquet",),
    "megatron": (".idx",),
}
assert set(get_args(Kind)) == {"auto", *SUFFIXES}
# What a folder's files are by themselves: of code Python alone, as in data.paths; `kind: code` reads the others.
AUTO = ("text", "jsonl", "html", "warc", "parquet", "megatron")


def kind_of(name: str) -> str | None:
    """The kind of a file by its name; None if it isn't read.

    >>> kind_of("CC-MAIN-0001.warc.wet.gz"), kind_of("a.HTML"), kind_of("a.py"), kind_of("a.png")
    ('warc', 'html', 'code', None)
    """
    lower = name.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if lower.endswith(suffixes)), None)


def suffixes_of(kind: str) -> tuple[str, ...]:
    """The endings of the names that a folder is searched for."""
    if kind != "auto":
        return SUFFIXES[kind]
    python = tuple(".py" + packed for packed in PACKED)
    return sum((SUFFIXES[name] for name in AUTO), python)
