"""How answers are generated, by the names of the papers' protocols. Imports no torch.

V3 (arXiv 2412.19437, §5.3.1): AIME and CNMO at temperature 0.7, mean of 16 runs; MATH-500 greedy; at most 8,192 tokens.
R1 (arXiv 2501.12948): temperature 0.6, top-p 0.95, at most 32,768 tokens; 64 answers for AIME and GPQA, 16 for MATH.
DeepSeek LLM (arXiv 2401.02954, §5): the repetition ratio is the share of greedy answers that never end.
bits: nothing is generated; only the bits per byte of the expected text are measured, as for programs.
"""

from typing import NamedTuple

from dsv3_lightning.common.wording import nearest
from dsv3_lightning.errors import ConfigError


class Protocol(NamedTuple):
    """temperature: 0 is greedy. repeats: answers to each question. max_new_tokens: a model's context may hold less."""

    temperature: float
    top_p: float
    repeats: int
    max_new_tokens: int


PROTOCOLS = {
    "greedy": Protocol(0.0, 1.0, 1, 512),
    "aime": Protocol(0.7, 1.0, 16, 8192),
    "cnmo": Protocol(0.7, 1.0, 16, 8192),
    "math-500": Protocol(0.0, 1.0, 1, 8192),
    "r1": Protocol(0.6, 0.95, 64, 32768),
    "repetition": Protocol(0.0, 1.0, 1, 4096),
    "bits": Protocol(0.0, 1.0, 0, 1),
}


def protocol_of(name: str) -> Protocol:
    """The protocol of a name. Raises ConfigError."""
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol {name!r}: no such protocol{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
