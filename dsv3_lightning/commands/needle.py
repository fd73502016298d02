"""`dsv3 needle`: the needle-in-a-haystack check of a run's model, on its validation text, with a heat map."""

import argparse
from pathlib import Path

from dsv3_lightning.common.files import make_folder, write_file
from dsv3_lightning.common.flags import positive, run_argument
from dsv3_lightning.common.paths import display_path, path_argument
from dsv3_lightning.common.plots import heat_map, save_figure
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        metavar="N",
        help="text lengths in tokens; default: 1/4, 1/2 and all of the context",
    )
    parser.add_argument(
        "--depths", type=positive, default=5, metavar="N", help="depths of the needle; default %(default)s"
    )
    parser.add_argument("--texts", type=positive, default=8, metavar="N", help="texts per cell; default %(default)s")
    help = "default: needle/ in the run's folder, or next to a consolidated file"
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help=help)


def run(run: Path, lengths: list[int] | None, depths: int, texts: int, out: Path | None) -> int:
    """Prints how many nats the needle saves by length and depth; writes needle.json and needle.png."""
    from dsv3_lightning.commands.placement import validation_batches
    from dsv3_lightning.inference.needle import find_needles
    from dsv3_lightning.runs.models import find_checkpoint, load_model

    checkpoint, folder, config, tokenizer, _ = find_checkpoint(run)
    target = folder / "needle" if out is None else out
    limit = config.model.max_position_embeddings
    lengths = lengths or [limit // part for part in (4, 2, 1)]
    if max(lengths) > limit:
        raise ConfigError(f"--lengths {max(lengths)}: the model's context has {limit} positions")
    make_folder("--out", target)
    places = [place / max(depths - 1, 1) for place in range(depths)]
    filler: list[int] = []
    for batch in validation_batches(config, folder):
        filler += batch["tokens"][batch["mask"]].tolist()
        if len(filler) > 4 * max(lengths):
            break
    found = find_needles(load_model(checkpoint, config.model), tokenizer, filler, lengths, places, texts)
    print("nats per token that the needle saves (share that greedy decoding gets right)")
    print("length " + "".join(f"      at {place:4.0%} " for place in places))
    for row, length in enumerate(lengths):
        cells = zip(found.saved[row].tolist(), found.right[row].tolist())
        print(f"{length:6} " + "".join(f"  {saved:5.2f} ({right:4.0%})" for saved, right in cells))
    content = {"lengths": lengths, "depths": places, "texts": texts}
    content |= {name: value.tolist() for name, value in found._asdict().items()}
    write_file(target / "needle.json", strict_json(content) + "\n")
    picture = heat_map(found.saved, "nats per token that the needle saves (share right)", 0.0)
    axes = picture.axes[0]
    strongest = max(1.0, float(found.saved.abs().max()))  # so that noise stays pale
    axes.images[0].set_clim(-strongest, strongest)
    for row in range(len(lengths)):
        for column in range(len(places)):
            cell = f"{found.saved[row, column]:.2f} ({found.right[row, column]:.0%})"
            axes.text(column, row, cell, ha="center", va="center", size=8)
    axes.set(xlabel="depth of the needle", ylabel="tokens")
    axes.set_xticks(range(len(places)), [f"{place:.0%}" for place in places])
    axes.set_yticks(range(len(lengths)), [str(length) for length in lengths])
    save_figure(picture, target / "needle.png")
    print(f"{display_path(target)}: needle.json and needle.png")
    return 0
