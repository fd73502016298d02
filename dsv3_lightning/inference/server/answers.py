"""Responses to a request: complete, or streamed as server-sent events."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, Protocol

from starlette.requests import Request
from starlette.responses import StreamingResponse

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.inference.batching import Engine, Finish, Job
from dsv3_lightning.inference.likely import TokenScore
from dsv3_lightning.inference.server.fields import Wanted
from dsv3_lightning.inference.server.logprobs import of_chat, of_completion
from dsv3_lightning.inference.server.refusals import Refused, to_json

Piece = tuple[int, str, Finish | None, list[TokenScore]]  # number of the text, and as delivered by its job
Scores = list[TokenScore] | None  # None if the request asks for none
POLL = 0.2  # seconds between checks for a disconnected client


class Prompt(NamedTuple):
    """Token ids of a prompt, of which the server added the first `silent` to a text."""

    ids: list[int]
    silent: int = 0


class Answers:
    """The texts of one HTTP request: pieces come from the engine's thread and are read in the event loop.

    max_new_tokens: the limit for each text if the request has none. Raises ConfigError and Busy like `Engine.submit`.
    """

    def __init__(self, engine: Engine, asked: Wanted, prompts: list[Prompt], max_new_tokens: int) -> None:
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue[Piece]()
        self.engine = engine
        seed = int.from_bytes(os.urandom(6), "big") if asked.seed is None else asked.seed % 2**64
        count = max_new_tokens if asked.max_new_tokens is None else asked.max_new_tokens
        self.jobs = [
            Job(prompt.ids, count, asked.sampling, seed, asked.stop, self.deliverer(number), number,
                asked.top, asked.echo, prompt.silent)
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(asked.copies))
        ]  # fmt: skip
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self.scored = asked.top is not None
        engine.submit(self.jobs)

    def deliverer(self, index: int) -> Callable[[str, Finish | None, list[TokenScore]], None]:
        def deliver(piece: str, finish: Finish | None, scores: list[TokenScore]) -> None:
            self.loop.call_soon_threadsafe(self.events.put_nowait, (index, piece, finish, scores))

        return deliver

    async def pieces(self, request: Request) -> AsyncIterator[Piece]:
        """Yields pieces until every text has ended; frees rows of a disconnected client. Raises Refused on failure."""
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
                    index, piece, finish, scores = await asyncio.wait_for(self.events.get(), POLL)
                except asyncio.TimeoutError:
                    continue
                if finish == "timeout":
                    raise Refused(504, f"not finished within {self.engine.seconds:g} seconds", "timeout_error")
                if finish == "error":
                    raise Refused(500, "decoding failed", "server_error")
                left -= finish is not None
                yield index, piece, finish, scores
        finally:
            for job in self.jobs:
                self.engine.cancel(job)

    def usage(self) -> dict[str, int]:
        written = sum(job.tokens for job in self.jobs)
        total = self.prompt_tokens + written
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": total}


class Form(Protocol):
    """The JSON format of one kind of response."""

    kind: str
    chunk_kind: str
    prefix: str

    def choice(self, index: int, text: str, finish: Finish | None, scores: Scores) -> dict[str, Any]:
        """A choice with its whole text."""

    def chunk(self, index: int, text: str, finish: Finish | None, scores: Scores) -> dict[str, Any]:
        """A streamed piece of a choice."""


class CompletionForm:
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def choice(self, index: int, text: str, finish: Finish | None, scores: Scores) -> dict[str, Any]:
        logprobs = scores and of_completion(self.tokenizer, scores)
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs or None}

    chunk = choice


class ChatForm:
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.begun: set[int] = set()

    def choice(self, index: int, text: str, finish: Finish | None, scores: Scores) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "finish_reason": finish, "logprobs": self.logprobs(scores)}

    def logprobs(self, scores: Scores) -> dict[str, Any] | None:
        return None if scores is None else of_chat(self.tokenizer, scores)

    def chunk(self, index: int, text: str, finish: Finish | None, scores: Scores) -> dict[str, Any]:
        """A streamed piece of a choice. Only the first has the role, since clients concatenate deltas."""
        role = {} if index in self.begun else {"role": "assistant"}
        self.begun.add(index)
        delta = role | {"content": text}
        return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": self.logprobs(scores or None)}


def head(form: Form, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{form.prefix}-{os.urandom(12).hex()}", "object": kind, "created": int(time.time()), "model": model}


async def collect(answers: Answers, request: Request, form: Form, model: str) -> dict[str, Any]:
    """The response with all texts complete."""
    texts = [""] * len(answers.jobs)
    ends: list[Finish | None] = [None] * len(answers.jobs)
    scores: list[list[TokenScore]] = [[] for _ in answers.jobs]
    async for index, piece, finish, more in answers.pieces(request):
        texts[index] += piece
        ends[index] = finish or ends[index]
        scores[index] += more
    found = scores if answers.scored else [None] * len(scores)
    choices = [form.choice(index, *of_text) for index, of_text in enumerate(zip(texts, ends, found, strict=True))]
    return head(form, form.kind, model) | {"choices": choices, "usage": answers.usage()}


def stream(answers: Answers, request: Request, form: Form, model: str, include_usage: bool) -> StreamingResponse:
    """Server-sent events: pieces of choices, then the usage if it was requested, then [DONE]."""
    frame = head(form, form.chunk_kind, model)

    async def events() -> AsyncIterator[bytes]:
        try:
            async for index, piece, finish, scores in answers.pieces(request):
                yield event(frame | {"choices": [form.chunk(index, piece, finish, scores)]})
            if include_usage:
                yield event(frame | {"choices": [], "usage": answers.usage()})
        except Refused as error:
            yield event(error.body())
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"
