"""Error responses: a status, and OpenAI's JSON format."""

import json
from typing import Any

from starlette.responses import JSONResponse, Response


class Refused(Exception):
    """A refused request. param: the invalid field, if any. code: OpenAI's error code, if it has one."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self, headers: dict[str, str] | None = None) -> Response:
        return Json(self.body(), self.status, headers)


class Json(JSONResponse):
    """A JSON response that can contain lone surrogates."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    """UTF-8 JSON. Lone surrogates, which UTF-8 can't encode, are escaped (\\ud83d), so every client can read them."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
