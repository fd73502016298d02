"""The endpoints of the server: /v1/models, /v1/completions, /v1/chat/completions, /health, and those of tokens.py.

Work that grows with the length of a request (JSON, fields, tokenization) runs in a thread, since all clients share the
event loop. Invalid requests get a 4xx status and the reason, in OpenAI's error format.
"""

import asyncio
import hmac
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.batching import Busy, Engine
from dsv3_lightning.inference.chat import chat_prompt
from dsv3_lightning.inference.server.answers import (
    Answers,
    ChatForm,
    CompletionForm,
    Form,
    Prompt,
    collect,
    stream,
)
from dsv3_lightning.inference.server.bodies import MEGABYTE, parse, read_body
from dsv3_lightning.inference.server.fields import CHAT, COMPLETION, Wanted, wanted
from dsv3_lightning.inference.server.handlers import read_fields
from dsv3_lightning.inference.server.refusals import Json, Refused
from dsv3_lightning.inference.server.tokens import DETOKENIZE, TOKENIZE, tokenize, tokenizer_info
from dsv3_lightning.inference.text import longest_token, prompt_ids

T = TypeVar("T")
COMPLETION_TOKENS = 16  # OpenAI's default for completions


@dataclass
class Service:
    """A model, served under `name`. body_bytes: the size limit of a request."""

    engine: Engine
    tokenizer: Tokenizer
    name: str
    body_bytes: int

    def __post_init__(self) -> None:
        self.started = int(time.time())
        self.longest = longest_token(self.tokenizer)

    async def health(self, request: Request) -> Response:
        return Json({"running": len(self.engine.running), "waiting": len(self.engine.queue)})

    async def models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self.model()]})

    async def one_model(self, request: Request) -> Response:
        self.check_model(request.path_params["name"])
        return Json(self.model())

    def model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "dsv3-lightning"}

    async def completions(self, request: Request) -> Response:
        asked, prompts = await self.read(request, self.completion_prompts)
        return await self.answer(request, asked, prompts, COMPLETION_TOKENS, CompletionForm(self.tokenizer))

    async def chat_completions(self, request: Request) -> Response:
        asked, prompts = await self.read(request, self.chat_prompts)
        room = max(self.engine.limit - len(prompts[0].ids), 1)
        return await self.answer(request, asked, prompts, room, ChatForm(self.tokenizer))

    async def tokenize(self, request: Request) -> Response:
        return Json(await self.read(request, self.tokens_of_text))

    async def detokenize(self, request: Request) -> Response:
        return Json({"prompt": await self.read(request, self.text_of_tokens)})

    async def tokenizer_info(self, request: Request) -> Response:
        return Json(tokenizer_info(self.tokenizer, self.engine.limit))

    async def read(self, request: Request, made_of: Callable[[Any], T]) -> T:
        """What made_of(JSON) makes of the request's body, outside the event loop."""
        body = await read_body(request, self.body_bytes)
        return await asyncio.to_thread(lambda: made_of(parse(body)))

    def tokens_of_text(self, body: Any) -> dict[str, Any]:
        fields = read_fields(body, TOKENIZE, ("prompt",))
        self.check_model(fields.get("model", self.name))
        return tokenize(self.tokenizer, fields, self.engine.limit)

    def text_of_tokens(self, body: Any) -> str:
        fields = read_fields(body, DETOKENIZE, ("tokens",))
        self.check_model(fields.get("model", self.name))
        return self.tokenizer.decode(self.known("tokens", fields["tokens"]))

    def completion_prompts(self, body: Any) -> tuple[Wanted, list[Prompt]]:
        fields = read_fields(body, COMPLETION, ("model", "prompt"))
        asked = wanted(fields)
        self.check_model(asked.model)
        self.engine.check_count(len(fields["prompt"]) * asked.copies)
        marks = fields.get("parse_special", False)
        prompts = [self.prompt(prompt, marks) for prompt in fields["prompt"]]
        if asked.echo and asked.top is not None:
            self.check_room(prompts, COMPLETION_TOKENS if asked.max_new_tokens is None else asked.max_new_tokens)
        return asked, prompts

    def prompt(self, prompt: str | list[int], marks: bool) -> Prompt:
        if not isinstance(prompt, str):
            return Prompt(self.known("prompt", prompt))
        self.check_size("prompt", 0 if marks else 1, [prompt])
        ids = prompt_ids(self.tokenizer, prompt, marks)
        return Prompt(ids, silent=0 if marks and prompt.startswith(self.tokenizer.names[0]) else 1)

    def known(self, name: str, tokens: list[int]) -> list[int]:
        """The token ids. Raises Refused if the model does not have them all."""
        size = self.engine.model.config.vocab_size
        if any(not 0 <= token < size for token in tokens):
            raise Refused(400, f"{name}: a token lies outside 0 to {size - 1}", param=name)
        return tokens

    def check_room(self, prompts: list[Prompt], count: int) -> None:
        """Refuses prompts that leave no room for all new tokens: who reads log-probabilities by position counts on
        every one of them."""
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest + count > self.engine.limit:
            raise Refused(
                400,
                f"max_tokens={count}: with echo and logprobs {longest:,} tokens of prompt and {count:,} new ones must "
                f"fit the context of {self.engine.limit:,} tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def chat_prompts(self, body: Any) -> tuple[Wanted, list[Prompt]]:
        fields = read_fields(body, CHAT, ("model", "messages"))
        asked = wanted(fields)
        self.check_model(asked.model)
        messages = fields["messages"]
        self.check_size("messages", len(messages), [text for _, text in messages])
        return asked, [Prompt(chat_prompt(self.tokenizer, messages))]

    def check_size(self, name: str, marks: int, texts: list[str]) -> None:
        """Refuses, without tokenization, texts that exceed the context even if all their tokens were the longest.

        marks: the minimum number of control tokens that are added to the texts.
        """
        size = sum(len(text.encode()) for text in texts)
        least = marks + -(-size // self.longest)
        if least > self.engine.limit:
            raise Refused(
                400,
                f"{name}: {size:,} bytes of text are at least {least:,} tokens, longer than the context of "
                f"{self.engine.limit:,} tokens",
                param=name,
                code="context_length_exceeded",
            )

    def check_model(self, given: str) -> None:
        if given != self.name:
            raise Refused(
                404, f"model {given[:100]!r}: there is only {self.name!r}", param="model", code="model_not_found"
            )

    async def answer(
        self, request: Request, asked: Wanted, prompts: list[Prompt], max_new_tokens: int, form: Form
    ) -> Response:
        answers = Answers(self.engine, asked, prompts, max_new_tokens)
        if not asked.stream:
            return Json(await collect(answers, request, form, self.name))
        if isinstance(form, ChatForm):
            for index in range(asked.copies):  # as OpenAI starts a stream; its client expects choice 0 first
                answers.events.put_nowait((index, "", None, []))
        return stream(answers, request, form, self.name, asked.include_usage)


def build_app(
    engine: Engine,
    tokenizer: Tokenizer,
    name: str,
    body_bytes: int = 8 * MEGABYTE,
    key: str | None = None,
    origins: tuple[str, ...] = (),
) -> Starlette:
    """The web application. name: the model's name for clients. key: the API key that they must send, None for no key.
    origins: web origins that CORS headers allow."""
    service = Service(engine, tokenizer, name, body_bytes)
    routes = {
        "/health": (service.health, "GET"),
        "/v1/models": (service.models, "GET"),
        "/v1/models/{name:path}": (service.one_model, "GET"),
        "/v1/completions": (service.completions, "POST"),
        "/v1/chat/completions": (service.chat_completions, "POST"),
        "/tokenize": (service.tokenize, "POST"),
        "/detokenize": (service.detokenize, "POST"),
        "/tokenizer_info": (service.tokenizer_info, "GET"),
    }

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error.response()

    async def impossible(request: Request, error: Exception) -> Response:
        return Refused(400, str(error)).response()

    async def busy(request: Request, error: Exception) -> Response:
        message = f"{engine.max_waiting} requests are waiting already; try again later"
        return Refused(429, message, "rate_limit_error").response({"Retry-After": "1"})

    async def no_route(request: Request, error: Exception) -> Response:
        """The response for an unknown path or a wrong method."""
        assert isinstance(error, HTTPException)
        asked, paths = f"{request.method} {request.url.path[:100]}", ", ".join(routes)
        if error.status_code == 405:
            return Refused(405, f"{asked}: the path takes {routes_method(request)}").response(dict(error.headers or {}))
        return Refused(error.status_code, f"{asked}: no such path; there are {paths}").response()

    def routes_method(request: Request) -> str:
        return next((method for path, (_, method) in routes.items() if path == request.url.path), "GET")

    async def failed(request: Request, error: Exception) -> Response:
        return Refused(500, "the server failed; its terminal shows why", "server_error").response()

    middleware = []
    if origins:
        methods, headers = ("GET", "POST"), ("*",)
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers)
        )
    if key is not None:
        middleware.append(Middleware(RequireKey, key=key))
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, (endpoint, method) in routes.items()],
        middleware=middleware,
        exception_handlers={
            Refused: refused, ConfigError: impossible, Busy: busy, HTTPException: no_route, Exception: failed,
        },
    )  # fmt: skip
    app.router.redirect_slashes = False
    app.state.ends = math.inf  # the time.monotonic() at which answers end
    return app


class RequireKey:
    """Middleware that answers 401 without the key, except for /health, which reveals no content."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.wanted):
                refusal = Refused(401, "Authorization: must be `Bearer` and the server's key", code="invalid_api_key")
                await refusal.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)
