"""`dsv3 export`: a run's model as a Hugging Face folder."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_lightning.common.files import write_file
from dsv3_lightning.common.flags import above_zero, run_argument
from dsv3_lightning.common.paths import display_path, path_argument
from dsv3_lightning.config.schema import Config
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.planning.parameters import count_parameters

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dsv3_lightning.model.transformer import Transformer


def arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("out", type=path_argument, metavar="OUT", help="the folder to make")
    types = ("float32", "bfloat16", "float16", "fp8")
    parser.add_argument(
        "--dtype",
        choices=types,
        default="float32",
        help="data type of the weights; fp8: blocks with scales, as V3; default %(default)s",
    )
    parser.add_argument(
        "--verify", type=path_argument, nargs="?", const=True, default=False, metavar="TOKENS.npy",
        help="write the model's logits to verify/ next to OUT, read OUT back and compare; random tokens without FILE",
    )  # fmt: skip
    parser.add_argument(
        "--file-gigabytes", type=above_zero, default=5.0, metavar="X", help="largest file; default %(default)s"
    )


def run(run: Path, out: Path, dtype: str, verify: Path | bool, file_gigabytes: float) -> int:
    """Writes the folder completely or not at all. verify: whether to compare logits, or a file of tokens for that."""
    from dsv3_lightning.hub.config import to_json
    from dsv3_lightning.hub.export import DTYPES, check_free, write_folder, write_weights
    from dsv3_lightning.hub.tokens import token_ids, write_generation_config, write_json, write_tokenizer
    from dsv3_lightning.hub.verify import all_logits, verification_tokens, write_logits
    from dsv3_lightning.runs.models import find_checkpoint, load_model, part_reader

    check_free(out)
    if dtype == "fp8" and verify is not False:
        raise ConfigError("--verify: compares weights of --dtype float32, bfloat16 or float16, not fp8")
    checkpoint, _, config, tokenizer, report = find_checkpoint(run)
    tokens = (
        None if verify is False else verification_tokens(verify if isinstance(verify, Path) else None, config.model)
    )

    def write(folder: Path) -> None:
        size = write_weights(config.model, part_reader(checkpoint), folder, DTYPES[dtype], int(file_gigabytes * 1e9))
        write_json(folder / "config.json", to_json(config.model, token_ids(tokenizer), dtype))
        write_tokenizer(tokenizer, folder, config.model.max_position_embeddings)
        write_generation_config(tokenizer, folder, tokenizer.ids_without_text(config.model.vocab_size))
        write_file(folder / "README.md", model_card(config, report, checkpoint.path))
        print(
            f"{display_path(out)}: {size:,} bytes of weights, {dtype}, from {display_path(checkpoint.path)}", flush=True
        )

    to_json(config.model, {}, dtype)  # refuses what has no place there before anything is written
    if tokens is not None:
        model = load_model(checkpoint, config.model)
        expected = all_logits(model, tokens)
        write_logits(out.parent / "verify", tokens, expected)
    write_folder(out, write)
    return 0 if tokens is None else compare(out, model, tokens, expected, DTYPES[dtype])


def compare(folder: Path, model: "Transformer", tokens: "Tensor", expected: tuple, dtype: "torch.dtype") -> int:
    """Reads the folder back and compares its logits with those of the model with weights in the same precision."""
    import torch

    from dsv3_lightning.hub.verify import TOLERANCE, all_logits, largest_difference
    from dsv3_lightning.runs.models import load_hub_folder

    again = load_hub_folder(folder)
    rounded = largest_difference(expected, all_logits(again, tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    difference = largest_difference(all_logits(model, tokens), all_logits(again, tokens))
    print(
        f"verified: logits of {tokens.numel()} tokens differ by {rounded:.1e} from the training model's"
        + ("" if dtype is torch.float32 else f", by {difference:.1e} from its own with weights rounded alike")
    )
    if difference <= TOLERANCE:
        return 0
    shown = display_path(folder)
    print(f"dsv3: {shown}: the export differs by {difference:.1e}, more than {TOLERANCE}", file=sys.stderr)
    return 1


def model_card(config: Config, report: dict[str, Any], path: Path) -> str:
    """The folder's README.md: a description, how to load the model, and the run's report."""
    counts = count_parameters(config.model)
    rows = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in report.items() if value is not None)
    results = f"\n## The run's report\n\n| | |\n| --- | --- |\n{rows}\n" if rows else ""
    mtp = f"\nIt has {config.model.mtp_depth} multi-token prediction modules, stored as layers after the last.\n"
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {config.run.name}\n\n{counts.total:,} parameters, {counts.active:,} active per token; context of "
        f"{config.model.max_position_embeddings:,} tokens. Trained with dsv3-lightning; from `{path.name}`.\n"
        f"{mtp if config.model.mtp_depth else ''}\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n'
        'print(tokenizer.decode(model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=64)[0]))\n'
        f"```\n{results}"
    )
