"""Continuous batching: texts join and leave the batch between decoding steps, which add one token to each.

A single thread uses model and cache. Between two steps it drops cancelled and overdue texts and moves waiting ones into
free rows (each prompt is a separate forward pass); then every row advances by a token.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.decoder import Decoder, check_lengths, context_of, without
from dsv3_lightning.inference.likely import TokenScore, prompt_scores, text_of, token_scores
from dsv3_lightning.inference.sampling import Sampling, random_stream
from dsv3_lightning.inference.text import TextStream
from dsv3_lightning.model.transformer import Transformer

Finish = Literal["stop", "length", "timeout", "error"]


class Busy(Exception):
    """Raised if the queue of waiting texts is full."""


@dataclass(eq=False)
class Job:
    """A text to generate. deliver(piece, finish, scores) is called from the engine's thread, with finish None until the
    last piece, then the reason of the end: `stop` (end token or stop string), `length`, `timeout` or `error`. number:
    the number of the text in its request, each of which has its own random stream. tokens: the number of new tokens.

    top: how many of the most likely tokens come with the log-probabilities of each, None for no log-probabilities.
    echo: whether the text begins with its prompt, of which the first `silent` tokens are not shown. scores: of the
    tokens whose text is not yet delivered, an end token included; those of a stop string and after it never are.
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    deliver: Callable[[str, Finish | None, list[TokenScore]], None]
    number: int = 0
    top: int | None = None
    echo: bool = False
    silent: int = 0
    tokens: int = 0
    cancelled: bool = False
    last: int = -1
    deadline: float = field(default=0.0)
    stream: TextStream | None = None
    generator: torch.Generator | None = None
    scores: list[TokenScore] = field(default_factory=list)
    echoed: int = 0  # characters of the prompt
    delivered: int = 0  # characters in all

    def give(self, piece: str, finish: Finish | None, scores: Sequence[TokenScore] = ()) -> None:
        """Delivers a piece of the text with the given scores and those of new tokens that begin before its end."""
        self.delivered += len(piece)
        ended = finish is not None and not (self.stream is not None and self.stream.stopped)
        ready = [score for score in self.scores if ended or score.offset < self.delivered]
        self.scores = self.scores[len(ready) :]
        if not self.cancelled:
            self.deliver(piece, finish, [*scores, *ready])


class Engine:
    """The decoding thread and its queue. rows: texts decoded at a time. waiting: texts that may wait. seconds: the time
    limit of a text from its arrival. context: tokens of a text, by default the model's limit. Raises ConfigError."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        rows: int,
        waiting: int,
        seconds: float,
        context: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.limit = context_of(model.config, context)
        self.max_waiting, self.seconds = waiting, seconds
        unused = tokenizer.ids_without_text(model.config.vocab_size)
        self.decoder = Decoder(model, rows, self.limit, lower="--context or --slots", unused=unused)
        self.queue: deque[Job] = deque()
        self.running: list[Job] = []  # by row
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.work, name="decoding", daemon=True)
        self.thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queues all jobs or none. Raises ConfigError for an impossible one, Busy if too many are waiting."""
        self.check_count(len(jobs))
        for job in jobs:
            check_lengths([len(job.prompt)], job.max_new_tokens, self.limit)
            job.deadline = time.monotonic() + self.seconds
            job.stream = TextStream(self.tokenizer, job.stop)
            job.generator = random_stream(job.seed, job.number)
        with self.changed:
            if len(self.queue) + len(jobs) > self.max_waiting + self.rows - len(self.running):
                raise Busy
            self.queue.extend(jobs)
            self.changed.notify()

    def check_count(self, texts: int) -> None:
        """Raises ConfigError for more texts in one request than ever fit; not Busy, since waiting would not help."""
        if texts > self.rows + self.max_waiting:
            most = f"slots={self.rows} and max_waiting={self.max_waiting} hold {self.rows + self.max_waiting} at most"
            raise ConfigError(f"{texts} texts in one request: {most}")

    def cancel(self, job: Job) -> None:
        """Stops a job: nothing more is delivered, and its row is free after the current step."""
        job.cancelled = True

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def work(self) -> None:
        while True:
            with self.changed:
                while not (self.closed or self.queue or self.running):
                    self.changed.wait()
                if self.closed:
                    return
            try:
                self.step()
            except Exception as error:  # tell waiting clients, and start cleanly with the next jobs
                print(f"dsv3: decoding failed: {type(error).__name__}: {error}", flush=True)
                for job in self.running:
                    job.deliver("", "error", [])
                self.running = []

    @torch.inference_mode()
    def step(self) -> None:
        """Drops ended texts, admits waiting ones, and advances each by a token."""
        now = time.monotonic()
        for row in reversed(range(len(self.running))):
            if self.over(self.running[row], now):
                self.leave(row)
        with self.changed:
            for job in [job for job in self.queue if self.over(job, now)]:
                self.queue.remove(job)
        while len(self.running) < self.rows:
            with self.changed:
                if not self.queue:
                    break
                job = self.queue.popleft()
                self.running.append(job)
            self.begin(job)
        if self.running:
            last = torch.tensor([[job.last] for job in self.running], device=self.decoder.device)
            logits_BV = self.decoder.head(self.decoder.extend(last))[:, -1]
            for row in reversed(range(len(self.running))):
                self.take(row, logits_BV[row : row + 1])

    def over(self, job: Job, now: float) -> bool:
        late = now > job.deadline
        if late and not job.cancelled:
            job.deliver("", "timeout", [])
        return late or job.cancelled

    def begin(self, job: Job) -> None:
        row = len(self.running) - 1
        self.decoder.lengths[row] = 0
        h_1TD = self.decoder.extend(torch.tensor([job.prompt], device=self.decoder.device), row)
        if job.echo:
            text, offsets = text_of(self.tokenizer, job.prompt, job.silent)
            wanted = job.top is not None and not job.cancelled
            scores = prompt_scores(self.decoder, h_1TD[0], job.prompt, offsets, job.top or 0) if wanted else []
            job.echoed = len(text)
            job.give(text, None, scores)
        if job.max_new_tokens:
            self.take(row, self.decoder.head(h_1TD[:, -1:])[:, -1])
        else:
            self.end(row, "length")

    def take(self, row: int, logits_1V: torch.Tensor) -> None:
        """Samples and delivers the next token of a row, and ends its text if it was the last. Changes the logits."""
        job = self.running[row]
        assert job.stream is not None and job.generator is not None
        whole_1V = logits_1V if job.top is None else logits_1V.clone()
        (job.last,) = job.sampling.pick(without(logits_1V, self.decoder.unused), [job.generator])
        if job.last in self.tokenizer.end_ids:
            self.note(job, whole_1V, job.stream.decoded)
            self.end(row, "stop")
            return
        if len(job.prompt) + job.tokens >= self.limit:
            self.end(row, "length")
            return
        job.tokens += 1
        piece = job.stream.push(job.last)
        self.note(job, whole_1V, job.stream.start)
        if piece:
            job.give(piece, None)
        if job.stream.stopped:
            self.end(row, "stop")
        elif job.tokens >= job.max_new_tokens or len(job.prompt) + job.tokens >= self.limit:
            self.end(row, "length")

    def note(self, job: Job, logits_1V: torch.Tensor, start: int) -> None:
        """Adds the last token's score, if wanted. start: the characters of the new text before it."""
        if job.top is not None:
            unused = self.decoder.unused
            job.scores += token_scores(logits_1V, [job.last], [job.echoed + start], job.top, unused)

    def end(self, row: int, why: Finish) -> None:
        job = self.running[row]
        assert job.stream is not None
        job.give(job.stream.finish(), why)
        self.leave(row)

    def leave(self, row: int) -> None:
        """Frees a row by moving the last one into it."""
        with self.changed:
            self.decoder.move(len(self.running) - 1, row)
            self.running[row] = self.running[-1]
            self.running.pop()


def check_engine(rows: int, waiting: int, seconds: float) -> None:
    for name, value, least in (("slots", rows, 1), ("max_waiting", waiting, 0)):
        if value < least:
            raise ConfigError(f"{name}={value}: must be at least {least}")
    if not seconds > 0:
        raise ConfigError(f"timeout={seconds}: must be above 0 seconds")
