"""Several texts on one terminal, and the line about drafts below them."""

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.inference.speculative import Drafts
from dsv3_lightning.inference.text import TextStream


class TerminalWriter:
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


def acceptance_line(counts: Drafts) -> str:
    """What became of the guesses."""
    if not counts.passes:
        return "dsv3: no room for a token, so nothing was guessed"
    shares = ", ".join("none" if share is None else f"{share:.0%}" for share in counts.acceptance())
    per_pass = counts.tokens / counts.passes
    return f"dsv3: guesses kept, by depth: {shares}; {per_pass:.2f} tokens per pass of the main model"
