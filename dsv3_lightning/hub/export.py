"""Export of weights to safetensors files in the released layout. Memory: one file and one matrix at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv3_lightning.common.files import whole, write_file
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.config import interleaved_on_disk
from dsv3_lightning.hub.fp8 import SCALE
from dsv3_lightning.hub.layout import BIAS, Stored, layout, permutation, stored_shape, to_disk
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.fp8 import BLOCK, E4M3, round_to
from dsv3_lightning.model.transformer import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8": E4M3}
INDEX = "model.safetensors.index.json"
Read = Callable[[str, int | None], Tensor]


class Planned(NamedTuple):
    """A tensor that an export will contain, with its scales if it is FP8."""

    stored: Stored
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        blocks = [-(-size // side) for size, side in zip(self.shape, BLOCK)] if self.dtype == E4M3 else [0]
        return self.dtype.itemsize * torch.Size(self.shape).numel() + 4 * torch.Size(blocks).numel()


def plan(config: ModelConfig, dtype: torch.dtype) -> Iterator[Planned]:
    """All tensors of an export, planned from shapes only. In FP8 are the matrices of blocks; the others are bf16 then.

    As in the released weights, routers are not among them.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    for stored in layout(config):
        if stored.written:
            kept = torch.bfloat16 if dtype == E4M3 and not in_fp8(stored.key) else dtype
            if stored.key.endswith(BIAS):
                kept = torch.float32  # a step of 0.001 is lost in bf16 from 0.5 on
            yield Planned(stored, stored_shape(stored, shapes[stored.name]), kept)


def in_fp8(key: str) -> bool:
    """Whether the released weights have this tensor in FP8: projections, but for the one that joins MTP's inputs."""
    return key.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not key.endswith("eh_proj.weight")


def into_files(planned: Iterator[Planned], file_bytes: int) -> list[list[Planned]]:
    """Splits tensors, in order, into files of at most `file_bytes`, or of a single larger tensor."""
    files: list[list[Planned]] = [[]]
    size = 0
    for item in planned:
        if files[-1] and size + item.bytes > file_bytes:
            files.append([])
            size = 0
        files[-1].append(item)
        size += item.bytes
    return files


def write_weights(config: ModelConfig, read: Read, folder: Path, dtype: torch.dtype, file_bytes: int) -> int:
    """Writes the files and their index into `folder`; returns the bytes of all tensors.

    read(name, expert): our parameter or buffer, or one expert's matrix of a stacked one. Raises ConfigError with the
    tensor's name for a number beyond the range of `dtype`.
    """
    files = into_files(plan(config, dtype), file_bytes)
    permute = permutation(config.rope_interleave, interleaved_on_disk(config))
    places: dict[str, str] = {}
    for number, planned in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for stored, shape, kept in planned:
            tensor = to_disk(stored, read(stored.name, stored.expert), config.qk_rope_head_dim, permute)
            if tuple(tensor.shape) != shape:
                raise ConfigError(f"{stored.key}: would be {list(tensor.shape)}, the settings make it {list(shape)}")
            if kept == E4M3:
                numbers, scales, *_ = round_to(BLOCK, cast(tensor, torch.float32, stored.key))
                tensors |= {stored.key: numbers, stored.key + SCALE: scales}
            else:
                tensors[stored.key] = cast(tensor, kept, stored.key)
        try:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        places |= dict.fromkeys(tensors, name)
        del tensors
    total = sum(item.bytes for planned in files for item in planned)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_file(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return total


def cast(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """A contiguous copy in `dtype`. Raises ConfigError for numbers that are not finite in it."""
    out = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(out).all():
        raise ConfigError(f"{key}: holds a number that is not finite in {str(dtype).removeprefix('torch.')}")
    return out


def check_free(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out}: already exists; choose another folder, or remove it")


def write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Fills a temporary folder and renames it to `out` when complete. Raises ConfigError if `out` exists."""
    check_free(out)
    with whole(out) as beside:
        beside.mkdir()
        write(beside)
        check_free(out)  # another export may have finished first
