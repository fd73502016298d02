"""A model for lm-evaluation-harness: pass it to `lm_eval.simple_evaluate(model=…)`. Needs the extra
`harness`."""

from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Any

from dsv3_lightning.data.text.conversation import CHAT_TEMPLATE
from dsv3_lightning.data.text.tokenizer import Tokenizer
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.inference.chat import chat_prompt
from dsv3_lightning.inference.decode import decode
from dsv3_lightning.inference.sampling import Sampling
from dsv3_lightning.inference.scoring import BATCH_TOKENS, length_batches, score
from dsv3_lightning.inference.text import TextStream, encode, encode_with_marks
from dsv3_lightning.model.transformer import Transformer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ConfigError(f"the harness needs {error.name}: pip install 'dsv3-lightning[harness]'") from None

NEW_TOKENS = 256  # the harness's default
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p")


class HarnessModel(TemplateLM):
    """A model and its tokenizer as the harness calls them. Log-probabilities are natural, of the whole head.

    add_bos_token: whether texts start with the begin token, as in training and with exported tokenizers; the harness's
    `local-completions` never adds one. max_length: the tokens that the model sees, by default its limit; longer texts
    lose their beginning. batch_tokens: tokens of a batch, padding included. seed: of sampled texts.
    Raises ConfigError for a continuation that is longer than that and for an unknown setting of generation.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        add_bos_token: bool = True,
        max_length: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 1,
    ) -> None:
        super().__init__()
        limit = model.config.max_position_embeddings
        if max_length is not None and not 2 <= max_length <= limit:
            raise ConfigError(f"max_length={max_length}: must be between 2 and {limit}, the model's limit")
        self.model, self.words = model, tokenizer
        self.add_bos_token, self.max_length = add_bos_token, max_length or limit
        self.batch_tokens, self.seed = batch_tokens, seed
        self.marks = False
        self.unused = tokenizer.ids_without_text(model.config.vocab_size)

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        return self.words.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.words.sha256

    def chat_template(self, chat_template: bool | str = False) -> str:
        return CHAT_TEMPLATE

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one text. From then on names of control tokens in texts stand for these tokens."""
        self.marks = True
        ids = chat_prompt(self.words, [(message["role"], message["content"]) for message in chat_history])
        return self.words.decode(ids if add_generation_prompt else ids[:-1])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with the begin token if that is wanted and isn't there."""
        ids = encode_with_marks(self.words, string) if self.marks else encode(self.words, string)
        begins = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.words.bos_id, *ids] if begins and ids[:1] != [self.words.bos_id] else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _key, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(f"a continuation of {len(continuation)} tokens is above max_length={self.max_length}")
            pairs.append((context[-(self.max_length + 1 - len(continuation)) :], continuation))
        results = [(one.total, one.greedy) for one in score(self.model, pairs, self.batch_tokens)]
        for (key, _context, _continuation), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text after the begin token, in windows of max_length."""
        windows = [
            [make_disjoint_window(pair) for pair in get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False), self.prefix_token_id, self.max_length, 1
            )]
            for request in requests
        ]  # fmt: skip
        found = iter(self._loglikelihood_tokens([(None, *pair) for pair in chain.from_iterable(windows)]))
        totals = [sum(next(found)[0] for _ in of_text) for of_text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(number)
        for numbers in alike.values():
            settings = requests[numbers[0]].args[1]
            sampling, until, count = generation(settings)
            if count >= self.max_length:
                raise ConfigError(f"max_gen_toks={count}: leaves no room in max_length={self.max_length}")
            contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            prompts = [ids[-(self.max_length - count) :] or [self.prefix_token_id] for ids in contexts]
            for batch in length_batches([len(ids) + count for ids in prompts], 4 * self.batch_tokens):
                written = self.write([prompts[place] for place in batch], count, sampling, until)
                for place, text in zip(batch, written, strict=True):
                    texts[numbers[place]] = text
                    self.cache_hook.add_partial("generate_until", requests[numbers[place]].args, text)
        return texts

    def write(self, prompts: list[list[int]], count: int, sampling: Sampling, until: tuple[str, ...]) -> list[str]:
        streams = [TextStream(self.words, until) for _ in prompts]
        texts = [""] * len(prompts)

        def take(number: int, token: int) -> bool:
            texts[number] += streams[number].push(token)
            return streams[number].stopped

        decode(self.model, prompts, count, sampling, self.words.end_ids, self.seed, take, self.unused)
        return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]


def generation(settings: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...], int]:
    """Sampling, stop strings and number of new tokens from a task's generation_kwargs. As in the harness, texts are
    greedy without do_sample or a temperature. Raises ConfigError for a setting that is not known here."""
    for name in settings:
        if name not in GENERATION:
            raise ConfigError(f"generation_kwargs.{name}: is not supported here; there are {', '.join(GENERATION)}")
    drawn = settings.get("do_sample", "temperature" in settings)
    sampling = Sampling(
        temperature=settings.get("temperature", 1.0) if drawn else 0.0,
        top_k=settings.get("top_k", 0),
        top_p=settings.get("top_p", 1.0),
        min_p=settings.get("min_p", 0.0),
    )
    until = settings.get("until") or ()
    return sampling, (until,) if isinstance(until, str) else tuple(until), settings.get("max_gen_toks", NEW_TOKENS)
