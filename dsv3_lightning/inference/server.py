"""An OpenAI-compatible server over an engine: /v1/models, /v1/completions and /v1/chat/completions, with streaming.

Needs the `serve` extra (FastAPI and uvicorn). A wrong request is a 4xx with the reason, in OpenAI's form of an error.
"""

import asyncio
import json
import logging
import math
import os
import socket
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.batching import Busy, Engine, Finish, Job
from dsv3_lightning.inference.chat import chat_prompt
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.text import encode

LAST_ANSWERS = 5  # seconds that texts in the making get after Ctrl-C
POLL = 0.2  # seconds between two looks at whether the client is still there
NEUTRAL: dict[str, Any] = {  # fields that we don't have, with the value that changes nothing: clients send it
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "store": False,
}


class Refused(Exception):
    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        self.status, self.message, self.kind = status, message, kind


class Body(BaseModel):
    """What both kinds of request have. Fields that would change the answer and that we don't have are refused."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: Annotated[int, Field(ge=1, le=64)] = 1
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0

    @model_validator(mode="before")
    @classmethod
    def without_defaults(cls, fields: Any) -> Any:
        """In OpenAI's schema a null stands for an absent field. What is no object is left for pydantic to refuse."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None and not neutral(name, value)}

    def new_tokens(self) -> int | None:
        return self.max_tokens


def neutral(name: str, value: Any) -> bool:
    """By type too: 0 == False, but logprobs=0 asks /v1/completions for the log-probability of every token."""
    return name in NEUTRAL and type(value) is type(NEUTRAL[name]) and value == NEUTRAL[name]


class CompletionBody(Body):
    prompt: str | list[int] | list[str] | list[list[int]]
    echo: Literal[False] = False
    best_of: Literal[1] = 1


class Message(BaseModel):
    role: str
    content: str | list[dict[str, Any]]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in self.content):
            raise ConfigError("messages: only text is understood")
        return "".join(part["text"] for part in self.content)


class ChatBody(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None

    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Answers:
    """The texts of one HTTP request: pieces arrive from the engine's thread and are read in the event loop."""

    def __init__(self, engine: Engine, body: Body, prompts: list[list[int]], default_tokens: int) -> None:
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, str, Finish | None]]()
        self.engine = engine
        sampling = Sampling(body.temperature, body.top_k, body.top_p, body.min_p)
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        seed = int.from_bytes(os.urandom(6), "big") if body.seed is None else body.seed
        wanted = body.new_tokens()
        count = default_tokens if wanted is None else wanted
        self.jobs = [
            Job(prompt, count, sampling, seed, stop, self.deliverer(number), number)
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(body.n))
        ]
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        engine.submit(self.jobs)

    def deliverer(self, index: int):
        def deliver(piece: str, finish: Finish | None) -> None:
            self.loop.call_soon_threadsafe(self.events.put_nowait, (index, piece, finish))

        return deliver

    async def pieces(self, request: Request) -> AsyncIterator[tuple[int, str, Finish | None]]:
        """Until every text has ended. A client that goes away frees its rows. Raises Refused where one can't end."""
        left, looked = len(self.jobs), self.loop.time()
        try:
            while left:
                if time.monotonic() > request.app.state.ends:
                    raise Refused(503, "the server is shutting down", "server_error")
                if self.loop.time() > looked + POLL:
                    if await request.is_disconnected():
                        return
                    looked = self.loop.time()
                try:
                    index, piece, finish = await asyncio.wait_for(self.events.get(), POLL)
                except asyncio.TimeoutError:
                    continue
                if finish == "timeout":
                    raise Refused(504, f"not finished within {self.engine.seconds:g} seconds", "timeout_error")
                if finish == "error":
                    raise Refused(500, "decoding failed", "server_error")
                left -= finish is not None
                yield index, piece, finish
        finally:
            for job in self.jobs:
                self.engine.cancel(job)

    def usage(self) -> dict[str, int]:
        written = sum(job.tokens for job in self.jobs)
        total = self.prompt_tokens + written
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": total}


def build_app(engine: Engine, tokenizer: Tokenizer, name: str) -> FastAPI:
    """name: the model's, as clients give it."""
    app = FastAPI(title="dsv3-lightning")
    app.state.ends = math.inf  # when nobody is answered any more, by time.monotonic()
    started = int(time.time())

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error_body(error), error.status)

    @app.exception_handler(ConfigError)
    async def impossible(request: Request, error: ConfigError) -> JSONResponse:
        return JSONResponse(error_body(Refused(400, str(error))), 400)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        message = f"{engine.max_waiting} requests are waiting already; try again later"
        return JSONResponse(error_body(Refused(429, message, "rate_limit_error")), 429, {"Retry-After": "1"})

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_body(Refused(400, f"{where}: {first['msg']}")), 400)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": started, "owned_by": "dsv3-lightning"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {"running": len(engine.running), "waiting": len(engine.queue)}

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Any:
        check_model(body.model)
        answers = Answers(engine, body, [with_begin(p) for p in several(body.prompt)], default_tokens=16)
        frame = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": name}

        def choice(index: int, text: str, finish: Finish | None) -> dict[str, Any]:
            return {"index": index, "text": text, "finish_reason": finish, "logprobs": None}

        if body.stream:
            return stream(answers, body, request, frame, choice)
        return await collect(answers, request, frame, choice)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Any:
        check_model(body.model)
        prompt = chat_prompt(tokenizer, [(message.role, message.text()) for message in body.messages])
        room = max(engine.limit - len(prompt), 1)
        answers = Answers(engine, body, [prompt], default_tokens=room)
        frame = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": name}

        begun: set[int] = set()

        def delta(index: int, text: str, finish: Finish | None) -> dict[str, Any]:
            role = {} if index in begun else {"role": "assistant"}  # once per choice: clients join what comes
            begun.add(index)
            return {"index": index, "delta": role | {"content": text}, "finish_reason": finish}

        def message(index: int, text: str, finish: Finish | None) -> dict[str, Any]:
            return {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": finish}

        if body.stream:
            for index in range(body.n):  # as OpenAI opens a stream; its client wants to see choice 0 first
                answers.events.put_nowait((index, "", None))
            return stream(answers, body, request, frame | {"object": "chat.completion.chunk"}, delta)
        return await collect(answers, request, frame | {"object": "chat.completion"}, message)

    def check_model(wanted: str) -> None:
        if wanted != name:
            raise Refused(404, f"model {wanted!r}: there is only {name!r}")

    def with_begin(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return [tokenizer.bos_id, *encode(tokenizer, prompt)]
        size = engine.model.config.vocab_size
        if any(not 0 <= token < size for token in prompt):
            raise ConfigError(f"prompt: a token lies outside 0 to {size - 1}")
        return prompt

    return app


class Server(uvicorn.Server):
    """Whose Ctrl-C gives the texts in the making LAST_ANSWERS seconds and then tells their clients: a second before
    uvicorn would cut them off in mid-text."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_ANSWERS + 1))
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.ends = time.monotonic() + LAST_ANSWERS
        if self.server_state.tasks:
            print(f"dsv3: stopping; texts in the making get {LAST_ANSWERS} seconds", flush=True)
        # A second Ctrl-C, or a client that doesn't read, still ends in uvicorn's cut: a traceback each, and no news.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def several(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Any]:
    """A list of prompts, each text or tokens."""
    if isinstance(prompt, str) or prompt and isinstance(prompt[0], int):
        return [prompt]
    if not prompt:
        raise ConfigError("prompt: must not be an empty list")
    return list(prompt)


async def collect(answers: Answers, request: Request, frame: dict[str, Any], choice: Any) -> dict[str, Any]:
    texts = [""] * len(answers.jobs)
    ends: list[Finish | None] = [None] * len(answers.jobs)
    async for index, piece, finish in answers.pieces(request):
        texts[index] += piece
        ends[index] = finish or ends[index]
    choices = [choice(index, text, end) for index, (text, end) in enumerate(zip(texts, ends))]
    return frame | {"choices": choices, "usage": answers.usage()}


def stream(answers: Answers, body: Body, request: Request, frame: dict[str, Any], choice: Any) -> StreamingResponse:
    """Server-sent events: a choice at a time, then the usage where it was asked for, then [DONE]."""

    async def events() -> AsyncIterator[str]:
        try:
            async for index, piece, finish in answers.pieces(request):
                yield event(frame | {"choices": [choice(index, piece, finish)]})
            if (body.stream_options or {}).get("include_usage"):
                yield event(frame | {"choices": [], "usage": answers.usage()})
        except Refused as error:
            yield event(error_body(error))
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_body(error: Refused) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.kind, "param": None, "code": None}}


def new_id(kind: str) -> str:
    return f"{kind}-{os.urandom(12).hex()}"
