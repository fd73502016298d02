"""JSON that every parser reads. Imports no torch."""

import json
import math
from typing import Any


def strict_json(content: Any, **options: Any) -> str:
    """JSON text in which non-finite numbers are null, as JSON has no NaN or Infinity. options: for `json.dumps`.

    >>> strict_json({"loss": float("nan"), "steps": [1, 2.5]})
    '{"loss": null, "steps": [1, 2.5]}'
    """
    return json.dumps(without_non_finite(content), allow_nan=False, **options)


def without_non_finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_non_finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_non_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
