"""Speculative decoding: MTP modules draft tokens, and one pass of the main model verifies them (V3 §2.2, §5.4.3).

The text is that of plain decoding. After the tokens t_0 … t_n, module k drafts t_{n+k} from the output of module k - 1
at position n - 1, so the drafts form a chain. One pass of the main model over t_n and the drafts gives its prediction
after each of them. Greedy decoding accepts drafts as long as they equal these predictions. Sampling accepts a draft x
with probability min(1, p(x) / q(x)) and replaces the first rejected one by a draw from max(p - q, 0), so the result is
distributed exactly as p (arXiv 2211.17192, algorithm 1).

A position stays in a module's cache only if all tokens that its entry was computed from are final; the others are
computed again.
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
    """Counts of drafts by depth (drafted), and of those that became part of the text (accepted).

    Drafts beyond the end of a text count as neither. passes: of the main model. tokens: the tokens that these passes
    produced, end tokens included.
    """

    drafted: list[int]
    accepted: list[int]
    passes: int = 0
    tokens: int = 0

    def __iadd__(self, other: "Drafts") -> "Drafts":
        self.drafted = [a + b for a, b in zip(self.drafted, other.drafted, strict=True)]
        self.accepted = [a + b for a, b in zip(self.accepted, other.accepted, strict=True)]
        self.passes += other.passes
        self.tokens += other.tokens
        return self

    def acceptance(self) -> list[float | None]:
        """The share of accepted drafts by depth; None without drafts. An accepted draft follows accepted ones only."""
        return [accepted / drafted if drafted else None for accepted, drafted in zip(self.accepted, self.drafted)]


@dataclass
class Speculation:
    """One text that is being written. `tokens` are final; the main model's cache holds all of them but the last.

    waiting_1TD: by module, h_{k-1} at the positions that are not final in the module's cache.
    """

    decoder: Decoder
    tokens: list[int]
    sampling: Sampling
    generator: torch.Generator
    waiting_1TD: list[Tensor] = field(default_factory=list)

    def begin(self) -> None:
        """Runs the prompt through the model and appends the first new token."""
        h_1TD = self.decoder.extend(self.tensor(self.tokens))
        self.waiting_1TD = [h_1TD, *(h_1TD[:, :0] for _ in self.decoder.mtp_lengths[1:])]
        self.tokens.append(self.sampling.pick(self.decoder.logits(h_1TD[:, -1:])[:, 0], [self.generator])[0])

    def round(self, depth: int) -> list[int]:
        """Drafts, verifies and returns the next tokens, 1 to 1 + depth of them."""
        drafts, q_TV = self.draft(depth)
        h_1TD = self.decoder.extend(self.tensor([self.tokens[-1], *drafts]))
        new = self.verify(drafts, q_TV, self.decoder.logits(h_1TD)[0])
        accepted = len(new) - 1
        self.decoder.lengths[0] -= len(drafts) - accepted
        if self.waiting_1TD:
            seen = h_1TD[:, : accepted + 1]
            self.waiting_1TD[0] = seen if depth else torch.cat((self.waiting_1TD[0], seen), 1)
        self.tokens += new
        return new

    def draft(self, depth: int) -> tuple[list[int], list[Tensor]]:
        """`depth` drafts and, for sampling, the distribution that each was drawn from: fp64 [V], on the CPU."""
        n, lengths = len(self.tokens) - 1, self.decoder.mtp_lengths
        drafts: list[int] = []
        q_TV: list[Tensor] = []
        for k in range(1, depth + 1):
            start = lengths[k - 1][0]  # the first position that is not final in the module's cache
            tokens = [*self.tokens, *drafts][start + k : n + k]
            deepest = k == len(self.waiting_1TD)
            h_1TD = self.decoder.extend_mtp(k, self.waiting_1TD[k - 1], self.tensor(tokens), only_last=deepest)
            logits_1V = self.decoder.logits(h_1TD[:, -1:], k)[:, 0]
            if self.sampling.temperature == 0:
                drafts.append(int(logits_1V.argmax()))
            else:
                q_TV.append(self.sampling.probabilities(logits_1V)[0].cpu())
                drafts.append(draw(q_TV[-1], self.generator))
            final = max(n - k + 1, 0)  # positions i with i + k <= n
            lengths[k - 1][0] = final
            if not deepest:
                following = lengths[k][0]
                h_1TD = torch.cat((self.waiting_1TD[k][:, : start - following], h_1TD), 1)
                self.waiting_1TD[k] = h_1TD
            if k > 1:  # the final part of module k's input that it will need again
                used = self.waiting_1TD[k - 1]
                self.waiting_1TD[k - 1] = used[:, final - start : max(n - k + 2, 0) - start]
        return drafts, q_TV

    def verify(self, drafts: list[int], q_TV: list[Tensor], logits_TV: Tensor) -> list[int]:
        if self.sampling.temperature == 0:
            predicted = logits_TV.argmax(1).tolist()
            accepted = next((k for k, draft in enumerate(drafts) if draft != predicted[k]), len(drafts))
            return [*drafts[:accepted], predicted[accepted]]
        return accept(drafts, q_TV, self.sampling.probabilities(logits_TV).cpu(), self.generator)

    def tensor(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.decoder.device)


def accept(drafts: list[int], q_TV: list[Tensor], p_TV: Tensor, generator: torch.Generator) -> list[int]:
    """The accepted drafts and one more token. p_TV: the main model's, before the first draft and after each."""
    for k, (draft, q_V) in enumerate(zip(drafts, q_TV, strict=True)):
        chance = torch.rand((), dtype=torch.float64, generator=generator) * q_V[draft]
        if not chance < p_TV[k, draft]:
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
    """The new tokens, as `decode` returns them for one prompt, and the counts of drafts of `depth` modules.

    on_token(token): True ends the text with this token. number: the prompt's number among several, each of which has
    its own random stream. unused: ids that no token has, which are neither drafted nor drawn. Raises ConfigError.
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
    new, drafts = text.tokens[len(prompt) :], 0
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
        for k in range(drafts if used == len(new) else used):
            counts.drafted[k] += 1
            counts.accepted[k] += k < min(used, len(new) - 1)
        if ended:
            return written, counts
        drafts = min(depth, total - len(text.tokens) - 1)
        new = text.round(drafts)


def check_depth(model: Transformer, depth: int) -> None:
    """Raises ConfigError unless the model has `depth` sequential MTP modules."""
    config = model.config
    if not 1 <= depth <= config.mtp_depth or config.mtp_kind != "sequential":
        raise ConfigError(
            f"draft={depth}: must be between 1 and the model's MTP depth, {config.mtp_depth}, of sequential modules"
        )
