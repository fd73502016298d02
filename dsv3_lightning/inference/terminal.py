"""Output of `dsv3 generate`: several texts on one terminal, and a line about drafts below them."""

from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.inference.speculative import Drafts
from dsv3_lightning.inference.text import TextStream


class Texts:
    """Writes several texts to one terminal: the first as it comes, each other one when those before it have ended."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[str], stop: tuple[str, ...]) -> None:
        self.streams = [TextStream(tokenizer, stop) for _ in prompts]
        self.held, self.current = list(prompts), 0
        self.show()

    def push(self, number: int, token: int) -> bool:
        """Adds a token to a text; True if a stop string has ended it."""
        self.held[number] += self.streams[number].push(token)
        self.show()
        return self.streams[number].stopped

    def finish(self) -> None:
        """Ends the current text and begins to show the next."""
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
    """A line about the drafts: the share accepted at each depth, and tokens per pass."""
    if not counts.passes:
        return "dsv3: no room for a token, so nothing was drafted"
    shares = ", ".join("none" if share is None else f"{share:.0%}" for share in counts.acceptance())
    per_pass = counts.tokens / counts.passes
    return f"dsv3: drafts accepted, by depth: {shares}; {per_pass:.2f} tokens per pass of the main model"
