"""What a client is told when it doesn't get its answer: a status, and OpenAI's form of an error."""

import json
from typing import Any

from starlette.responses import JSONResponse, Response


class Refused(Exception):
    """param: the field that is wrong, where it is one. code: OpenAI's word for the reason, where it has one."""

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
    """JSON of any text."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    """UTF-8; half a character, which UTF-8 can't write, is JSON's \\ud83d, by which every client can read it."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
