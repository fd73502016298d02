"""A request's body: bytes up to a limit, then JSON of any text."""

import json
from typing import Any

from starlette.requests import Request

from dsv3_lightning.inference.server.refusals import Refused
from dsv3_lightning.inference.text import whole_characters

MEGABYTE = 1_000_000


async def read_body(request: Request, limit: int) -> bytes:
    """At most `limit` bytes are kept. Raises Refused for more, once all have come: a client that is still sending
    wouldn't read the reason."""
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
    """The JSON value, its texts without half characters. Raises Refused."""
    try:
        return with_whole_characters(json.loads(body))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON ({error})") from error


def with_whole_characters(value: Any) -> Any:
    """JSON can spell half a character, as \\ud83d, and clients that cut texts send some: none can be tokenized."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [with_whole_characters(one) for one in value]
    if isinstance(value, dict):
        return {whole_characters(name): with_whole_characters(one) for name, one in value.items()}
    return value
