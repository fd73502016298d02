"""MTP modules draft, the main model verifies: several tokens per pass, the text of plain decoding (V3 §2.2, §5.4.3).

After the tokens t_0 … t_n module k guesses t_{n+k} from what module k - 1 made of index n - 1, so the guesses are a
chain. One pass of the main model over t_n and the guesses tells what it would have said after each. Greedy: guesses are
kept as long as they are its own. Sampling: guess x is kept with probability min(1, p(x) / q(x)), and the first that is
not kept is replaced by a draw from max(p - q, 0), which leaves exactly p (arXiv 2211.17192, algorithm 1).

An index of a module's cache stays only if all tokens it was made of are certain; the others are made again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.decoder import Decoder, check_lengths
from dsv3_lightning.inference.sampling import Sampling, draw, random_stream
from dsv3_lightning.model.transformer import Transformer


@dataclass
class Drafts:
    """drafted, kept: guesses by depth, and how many of them came into the text. What was guessed behind a text's end
    counts as neither. passes: of the main model. tokens: what came of them, end tokens included.
    """

    drafted: list[int]
    kept: list[int]
    passes: int = 0
    tokens: int = 0

    def __iadd__(self, other: "Drafts") -> "Drafts":
        self.drafted = [a + b for a, b in zip(self.drafted, other.drafted, strict=True)]
        self.kept = [a + b for a, b in zip(self.kept, other.kept, strict=True)]
        self.passes += other.passes
        self.tokens += other.tokens
        return self

    def acceptance(self) -> list[float | None]:
        """By depth; a guess counts as kept only if those before it were. None where there was none."""
        return [kept / drafted if drafted else None for kept, drafted in zip(self.kept, self.drafted)]


@dataclass
class Speculation:
    """One text in the making. `tokens` are certain; the main model's cache holds all of them but the last.

    waiting_1TD: by module, h_{k-1} of the indices that it has yet to see for good.
    """

    decoder: Decoder
    tokens: list[int]
    sampling: Sampling
    generator: torch.Generator
    waiting_1TD: list[Tensor] = field(default_factory=list)

    def begin(self) -> None:
        """The prompt goes in, and its first continuation is certain."""
        h_1TD = self.decoder.extend(self.tensor(self.tokens))
        self.waiting_1TD = [h_1TD, *(h_1TD[:, :0] for _ in self.decoder.mtp_lengths[1:])]
        self.tokens.append(self.sampling.pick(self.decoder.logits(h_1TD[:, -1:])[:, 0], [self.generator])[0])

    def round(self, depth: int) -> list[int]:
        """Up to 1 + depth tokens more."""
        drafts, q_TV = self.draft(depth)
        h_1TD = self.decoder.extend(self.tensor([self.tokens[-1], *drafts]))
        new = self.verify(drafts, q_TV, self.decoder.logits(h_1TD)[0])
        kept = len(new) - 1
        self.decoder.lengths[0] -= len(drafts) - kept
        if self.waiting_1TD:
            seen = h_1TD[:, : kept + 1]
            self.waiting_1TD[0] = seen if depth else torch.cat((self.waiting_1TD[0], seen), 1)
        self.tokens += new
        return new

    def draft(self, depth: int) -> tuple[list[int], list[Tensor]]:
        """Guesses, and for sampling what each was drawn from."""
        n, lengths = len(self.tokens) - 1, self.decoder.mtp_lengths
        guesses: list[int] = []
        q_TV: list[Tensor] = []
        for k in range(1, depth + 1):
            start = lengths[k - 1][0]  # the first index that it has not seen for good
            tokens = [*self.tokens, *guesses][start + k : n + k]
            deepest = k == len(self.waiting_1TD)
            h_1TD = self.decoder.extend_mtp(k, self.waiting_1TD[k - 1], self.tensor(tokens), only_last=deepest)
            logits_1V = self.decoder.logits(h_1TD[:, -1:], k)[:, 0]
            if self.sampling.temperature == 0:
                guesses.append(int(logits_1V.argmax()))
            else:
                q_TV.append(self.sampling.probabilities(logits_1V)[0].cpu())
                guesses.append(draw(q_TV[-1], self.generator))
            certain = max(n - k + 1, 0)  # indices i with i + k <= n
            lengths[k - 1][0] = certain
            if not deepest:
                following = lengths[k][0]
                h_1TD = torch.cat((self.waiting_1TD[k][:, : start - following], h_1TD), 1)
                self.waiting_1TD[k] = h_1TD
            if k > 1:  # of what module k has used, the certain part that it will see again
                used = self.waiting_1TD[k - 1]
                self.waiting_1TD[k - 1] = used[:, certain - start : max(n - k + 2, 0) - start]
        return guesses, q_TV

    def verify(self, drafts: list[int], q_TV: list[Tensor], logits_TV: Tensor) -> list[int]:
        if self.sampling.temperature == 0:
            own = logits_TV.argmax(1).tolist()
            kept = next((k for k, guess in enumerate(drafts) if guess != own[k]), len(drafts))
            return [*drafts[:kept], own[kept]]
        return accept(drafts, q_TV, self.sampling.probabilities(logits_TV).cpu(), self.generator)

    def tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.decoder.device)


def accept(drafts: list[int], q_TV: list[Tensor], p_TV: Tensor, generator: torch.Generator) -> list[int]:
    """The drafts that are kept, and one token more. p_TV: the main model's, after each draft and before the first."""
    for k, (guess, q_V) in enumerate(zip(drafts, q_TV, strict=True)):
        chance = torch.rand((), dtype=torch.float64, generator=generator) * q_V[guess]
        if not chance < p_TV[k, guess]:
            return [*drafts[:k], draw((p_TV[k] - q_V).clamp(min=0), generator)]
    return [*drafts, draw(p_TV[len(drafts)], generator)]


def speculate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    end_ids: set[int],
    seed: int,
    depth: int,
    on_token: Callable[[int], bool] | None = None,
    number: int = 0,
    unused: Sequence[int] = (),
) -> tuple[list[int], Drafts]:
    """The new tokens, as `decode` gives them for one prompt, and what became of the guesses of `depth` modules.

    on_token(token): True ends the text with this token. number: which of several prompts this is, each with random
    numbers of its own. unused: ids that no token has, which are neither drafted nor drawn. Raises ConfigError.
    """
    check_depth(model, depth)
    limit = model.config.max_position_embeddings
    check_lengths([len(prompt)], max_new_tokens, limit)
    counts = Drafts([0] * depth, [0] * depth)
    total = min(len(prompt) + max_new_tokens, limit)
    if total == len(prompt):
        return [], counts
    decoder = Decoder(model, 1, total, depth, unused=unused)
    text = Speculation(decoder, list(prompt), sampling, random_stream(seed, number))
    text.begin()
    new, guesses = text.tokens[len(prompt) :], 0
    written: list[int] = []
    while True:
        used, ended = 0, False
        while used < len(new) and not ended:
            token, used = new[used], used + 1
            ended = token in end_ids
            if not ended:
                written.append(token)
                ended = on_token is not None and on_token(token) or len(prompt) + len(written) == total
        counts.passes += 1
        counts.tokens += used
        for k in range(guesses if used == len(new) else used):
            counts.drafted[k] += 1
            counts.kept[k] += k < min(used, len(new) - 1)
        if ended:
            return written, counts
        guesses = min(depth, total - len(text.tokens) - 1)
        new = text.round(guesses)


def check_depth(model: Transformer, depth: int) -> None:
    """Raises ConfigError where the model has no such modules."""
    config = model.config
    if not 1 <= depth <= config.mtp_depth or config.mtp_kind != "sequential":
        raise ConfigError(
            f"draft={depth}: must be between 1 and the model's MTP depth, {config.mtp_depth}, of sequential modules"
        )
