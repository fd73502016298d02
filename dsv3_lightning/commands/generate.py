"""`dsv3 generate`: continues a prompt with the model of a run, or of a Hugging Face folder."""

import functools
import sys
from pathlib import Path
from typing import Any

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.decoder import check_lengths
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.speculative import Drafts, check_depth, speculate
from dsv3_lightning.inference.text import TextStream, prompt_ids
from dsv3_lightning.runs.models import load


def generate(
    checkpoint: Path,
    prompt: list[str],
    parse_special: bool,
    draft: int,
    max_new_tokens: int,
    stop: list[str],
    seed: int,
    **sampling: Any,
) -> int:
    """Prints each prompt and, as it comes, its continuation; several are written together, or with guesses in turn.

    sampling: the fields of Sampling.
    """
    how = Sampling(**sampling)
    model, tokenizer = load(checkpoint)
    prompts = [prompt_ids(tokenizer, text, parse_special) for text in prompt]
    check_lengths([len(ids) for ids in prompts], max_new_tokens, model.config.max_position_embeddings)
    if draft:
        check_depth(model, draft)
    texts, ends = Texts(tokenizer, prompt, tuple(stop)), tokenizer.end_ids
    unused = tokenizer.ids_without_text(model.config.vocab_size)
    if not draft:
        decode(model, prompts, max_new_tokens, how, ends, seed, texts.push, unused)
        for _ in prompts:
            texts.finish()
        return 0
    counts = Drafts([0] * draft, [0] * draft)
    for number, ids in enumerate(prompts):
        show = functools.partial(texts.push, number)
        counts += speculate(model, ids, max_new_tokens, how, ends, seed, draft, show, number, unused)[1]
        texts.finish()
    print(told(counts), file=sys.stderr)
    return 0


class Texts:
    """Several texts on one terminal: one as it comes, the next when it has ended."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[str], stop: tuple[str, ...]) -> None:
        self.streams = [TextStream(tokenizer, stop) for _ in prompts]
        self.held, self.current = list(prompts), 0
        self.show()

    def push(self, number: int, token: int) -> bool:
        """Whether a stop string has ended the text."""
        self.held[number] += self.streams[number].push(token)
        self.show()
        return self.streams[number].stopped

    def finish(self) -> None:
        """Of the current text."""
        self.held[self.current] += self.streams[self.current].finish() + "\n"
        self.show()
        self.current += 1
        if self.current < len(self.held):
            print("---")
            self.show()

    def show(self) -> None:
        print(self.held[self.current], end="", flush=True)
        self.held[self.current] = ""


def told(counts: Drafts) -> str:
    """What became of the guesses."""
    if not counts.passes:
        return "dsv3: no room for a token, so nothing was guessed"
    shares = ", ".join("none" if share is None else f"{share:.0%}" for share in counts.acceptance())
    per_pass = counts.tokens / counts.passes
    return f"dsv3: guesses kept, by depth: {shares}; {per_pass:.2f} tokens per pass of the main model"
