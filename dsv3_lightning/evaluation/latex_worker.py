"""The process that compares LaTeX: pairs [answer, expected] in lines of JSON on stdin, a verdict per line on stdout.

The system ends it where a comparison takes more processor time than its limit, given in seconds as the only argument.
Imports no torch.
"""

import json
import resource
import sys
from typing import Any

MEMORY = 4 << 30  # bytes of address space; sympy's powers of powers would take all there is


def main() -> None:
    seconds = int(sys.argv[1])
    if sys.platform == "linux":  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    compare = comparison()
    print("ready", flush=True)
    for line in sys.stdin:
        answer, expected = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        print(compare(answer, expected), flush=True)


def comparison() -> Any:
    """The function that compares; its libraries take seconds to import, before any limit counts."""
    import logging

    import math_verify

    from dsv3_lightning.evaluation.expressions import clear, equal_expressions, literals
    from dsv3_lightning.evaluation.latex import squeezed

    logging.disable(logging.CRITICAL)  # it warns that its own time limit, a signal, is off
    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def parse(text: str) -> list[Any]:
        return math_verify.parse(rf"\boxed{{{clear(text)}}}", config, "no_fallback", parsing_timeout=None)

    def compare(answer: str, expected: str) -> str:
        """Right needs two readings that agree: math-verify's, which misreads some LaTeX, and our own.

        What only math-verify can read must also hold the same numbers.
        """
        if squeezed(answer) == squeezed(expected):
            return "right"
        try:
            ours = equal_expressions(answer, expected)
            if ours is False:
                return "wrong"
            gold, read = parse(expected), parse(answer)
            if not gold or not read:
                return "unreadable"
            same = math_verify.verify(gold, read, timeout_seconds=None)
        except (Exception, RecursionError, MemoryError):  # fails closed, whatever the libraries raise
            return "unreadable"
        return "right" if same and (ours or literals(answer) == literals(expected)) else "wrong"

    return compare


if __name__ == "__main__":
    main()
