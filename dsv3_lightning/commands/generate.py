"""`dsv3 generate`: continues a prompt with the model of a run, or of a Hugging Face folder."""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from dsv3_lightning.common.flags import model_argument, sampling_arguments, weights_argument
from dsv3_lightning.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    model_argument(parser)
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="what to continue; may be repeated"
    )
    help = "read names of control tokens in the prompt, such as <｜User｜>, as these tokens instead of text"
    parser.add_argument("--parse-special", action="store_true", help=help)
    parser.add_argument(
        "--draft", type=int, default=0, metavar="N", help="let N MTP modules draft tokens; the text stays the same"
    )
    weights_argument(parser)
    sampling_arguments(parser)


def run(
    checkpoint: Path,
    prompt: list[str],
    parse_special: bool,
    draft: int,
    weights: str,
    max_new_tokens: int,
    stop: list[str],
    seed: int,
    **sampling: Any,
) -> int:
    """Prints each prompt and streams its continuation; several prompts run as one batch, or in turn with drafts.

    sampling: the fields of Sampling.
    """
    from dsv3_lightning.inference.decode import decode
    from dsv3_lightning.inference.decoder import check_lengths
    from dsv3_lightning.inference.sampling import Sampling
    from dsv3_lightning.inference.single import fits
    from dsv3_lightning.inference.speculative import Drafts, check_depth, speculate
    from dsv3_lightning.inference.terminal import TerminalWriter, acceptance_line
    from dsv3_lightning.inference.text import prompt_ids
    from dsv3_lightning.runs.models import load

    how = Sampling(**sampling)
    if draft and weights != "fp32":
        raise ConfigError(f"--weights {weights}: can't be combined with --draft {draft}")
    model, tokenizer = load(checkpoint)
    prompts = [prompt_ids(tokenizer, text, parse_special) for text in prompt]
    check_lengths([len(ids) for ids in prompts], max_new_tokens, model.config.max_position_embeddings)
    if draft:
        check_depth(model, draft)
        if fits(model):
            print("dsv3: on this CPU --draft takes longer than plain decoding; the text is the same", file=sys.stderr)
    texts, ends = TerminalWriter(tokenizer, prompt, tuple(stop)), tokenizer.end_ids
    unused = tokenizer.ids_without_text(model.config.vocab_size)
    if not draft:
        decode(model, prompts, max_new_tokens, how, ends, seed, texts.push, unused, weights=weights)
        for _ in prompts:
            texts.finish()
        return 0
    counts = Drafts([0] * draft, [0] * draft)
    for number, ids in enumerate(prompts):
        show = functools.partial(texts.push, number)
        counts += speculate(model, ids, max_new_tokens, how, ends, seed, draft, show, number, unused)[1]
        texts.finish()
    print(acceptance_line(counts), file=sys.stderr)
    return 0
