"""Request bodies: bytes up to a limit, then JSON."""

import json
from typing import Any

from starlette.requests import Request

from dsv3_lightning.inference.server.refusals import Refused
from dsv3_lightning.inference.text import whole_characters

MEGABYTE = 1_000_000


async def read_body(request: Request, limit: int) -> bytes:
    """The body's bytes, at most `limit`. Raises Refused for more, but only after reading all of them: a client that is
    still sending would not read the reason."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"Content-Type: {kind}: must be application/json")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
    if size > limit:
        raise Refused(
            413,
            f"the request has {size:,} bytes; the server takes {limit:,} (dsv3 serve --body-megabytes)",
            code="request_too_large",
        )
    return b"".join(parts)


def parse(body: bytes) -> Any:
    """The JSON value, with lone surrogates in texts replaced. Raises Refused."""
    try:
        return with_whole_characters(json.loads(body))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON ({error})") from error


def with_whole_characters(value: Any) -> Any:
    """Replaces lone surrogates: JSON allows them (\\ud83d), truncated texts have some, no tokenizer takes them."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [with_whole_characters(one) for one in value]
    if isinstance(value, dict):
        return {whole_characters(name): with_whole_characters(one) for name, one in value.items()}
    return value
