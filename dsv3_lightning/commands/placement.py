"""`dsv3 placement`: assigns experts to GPUs by their load on a run's validation text."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3_lightning.common.files import make_folder, write_file
from dsv3_lightning.common.flags import positive, run_argument
from dsv3_lightning.common.paths import display_path, path_argument
from dsv3_lightning.common.plots import heat_maps, save_figure
from dsv3_lightning.common.strict_json import strict_json
from dsv3_lightning.config.schema import Config
from dsv3_lightning.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from dsv3_lightning.parallel.checkpoints.opened import OpenCheckpoint

BATCHES = 16  # of validation text


def arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument(
        "--gpus", type=positive, required=True, metavar="N", help="GPUs that serve the model, over all nodes"
    )
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="default %(default)s")
    parser.add_argument("--replicas", type=positive, metavar="N", help="expert replicas per layer, over all GPUs")
    parser.add_argument(
        "--loads",
        type=path_argument,
        metavar="FILE.npy",
        help="tokens per expert [layers, experts]; default: counted on validation text",
    )
    help = "default: placement/ in the run's folder, or next to a consolidated file"
    parser.add_argument("--out", type=path_argument, metavar="FOLDER", help=help)


def run(run: Path, gpus: int, nodes: int, replicas: int | None, loads: Path | None, out: Path | None) -> int:
    """Prints max/mean GPU load by layer before and after; writes placement.json and placement.png."""
    from dsv3_lightning.inference.expert_placement import gpu_loads, loads_in_order, overload, rebalance_experts
    from dsv3_lightning.runs.models import find_checkpoint

    checkpoint, folder, config, *_ = find_checkpoint(run)
    if not config.model.num_moe_layers:
        raise ConfigError(f"{run}: the model has no experts")
    experts = config.model.n_routed_experts
    if replicas is None:  # one more per GPU than needed, as in V3 §3.4.1
        replicas = (-(-experts // gpus) + 1) * gpus
    target = folder / "placement" if out is None else out
    make_folder("--out", target)
    weight_LE = count_load(config, checkpoint, folder) if loads is None else read_loads(loads, config)
    plan = rebalance_experts(weight_LE, replicas, config.model.n_group, nodes, gpus)
    before_LG, after_LG = loads_in_order(weight_LE, gpus), gpu_loads(weight_LE, plan, gpus)
    before_L, after_L = overload(before_LG), overload(after_LG)
    print("MoE layer  max/mean before  after")
    for layer, (before, after) in enumerate(zip(before_L.tolist(), after_L.tolist())):
        print(f"{layer:9}  {before:15.3f}  {after:5.3f}")
    print(f"mean       {before_L.mean():15.3f}  {after_L.mean():5.3f}")
    content = {"gpus": gpus, "nodes": nodes, "replicas": replicas, "load": weight_LE.tolist()}
    content |= {name: table.tolist() for name, table in plan._asdict().items()}
    write_file(target / "placement.json", strict_json(content) + "\n")
    save_figure(picture(before_LG, after_LG), target / "placement.png")
    shown = f"{display_path(target)}: placement.json and placement.png"
    print(f"{shown}, {replicas} replicas of {experts} experts on {gpus} GPUs")
    return 0


def picture(before_LG: "Tensor", after_LG: "Tensor") -> "Figure":
    """Maps of each GPU's load as a multiple of its layer's mean, from tokens [layers, GPUs] before and after."""
    before, after = (loads_LG / loads_LG.mean(1, keepdim=True).clamp(min=1e-12) for loads_LG in (before_LG, after_LG))
    return heat_maps({"GPU load over its mean, before": before, "after": after}, 1.0, columns="GPU")


def count_load(config: Config, checkpoint: "OpenCheckpoint", folder: Path) -> "Tensor":
    """Tokens per expert, int64 [L, E], over up to BATCHES validation batches."""
    import torch

    from dsv3_lightning.runs.models import load_model

    model = load_model(checkpoint, config.model)
    counts_LE = torch.zeros(config.model.num_moe_layers, config.model.n_routed_experts, dtype=torch.int64)
    for batch, _ in zip(validation_batches(config, folder), range(BATCHES)):
        documents_BS = batch.get("documents")
        with torch.no_grad():
            counts_LE += model.losses(batch["tokens"], batch["mask"], None, documents_BS=documents_BS).counts_LE
    if not counts_LE.any():
        raise ConfigError("data.validation_fraction: the run has no validation text to count on; give --loads FILE.npy")
    return counts_LE


def validation_batches(config: Config, folder: Path) -> "Iterable[dict[str, Tensor]]":
    """The batches that the run in this folder validates on."""
    from dsv3_lightning.data.batches.module import TextDataModule
    from dsv3_lightning.runs.record import read_inputs

    data = TextDataModule(config.data, config.model.mtp_depth, config.trainer["max_steps"], known=read_inputs(folder))
    data.prepare_data()
    data.setup("validate")
    return data.val_dataloader()


def read_loads(path: Path, config: Config) -> "Tensor":
    """The loads in an .npy file, fp64 [L, E]. Raises ConfigError."""
    import torch

    from dsv3_lightning.common.numbers import read_numbers

    array = read_numbers("--loads", path)
    shape = (config.model.num_moe_layers, config.model.n_routed_experts)
    if array.shape != shape:
        raise ConfigError(f"--loads {path}: is {list(array.shape)}, must be {list(shape)} (MoE layers, routed experts)")
    return torch.from_numpy(array).double()
