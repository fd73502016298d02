"""A Hugging Face folder: its files are read one tensor at a time, and FP8 blocks become numbers on the way."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_lightning.common.paths import user_path
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.config import EXPERTS, Described, from_json
from dsv3_lightning.hub.layout import Stored, from_disk, layout, permutation, stored_shape
from dsv3_lightning.hub.weights import READ_ERRORS, Weights, open_weights
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.transformer import Transformer

SCALE = "_scale_inv"
NO_WEIGHTS = ("rotary_emb.inv_freq",)  # older files of the Llama-shaped family hold the rotary angles
Place = Callable[[Tensor, int | None, Callable[[], Tensor]], None]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read ({getattr(error, 'strerror', 0) or error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return content


class HubFolder:
    """config.json and weights, with or without an index. Raises ConfigError, here and in every method."""

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.content = read_json(self.path / "config.json")
        described = from_json(self.content, str(self.path / "config.json"))
        self.notes = list(described.notes)
        self.described = self.without_absent_mtp(described)
        self.config = self.described.config

    @cached_property
    def files(self) -> dict[str, Weights]:
        return open_weights(self.path)

    @cached_property
    def keys(self) -> dict[str, str]:
        """The file of every tensor that is there."""
        return {key: name for name, file in self.files.items() for key in file.keys()}  # noqa: SIM118

    def without_absent_mtp(self, described: Described) -> Described:
        """Some conversions keep config.json's MTP modules and leave out their weights."""
        config = described.config
        first = f"model.layers.{config.num_hidden_layers}."
        if not config.mtp_depth or any(key.startswith(first) for key in self.keys):
            return described
        self.notes.append(f"{self.path}: config.json names {config.mtp_depth} MTP modules, the weights hold none")
        fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
        return described._replace(config=ModelConfig(**fields | {"num_nextn_predict_layers": 0}))

    def audit(self) -> None:
        """Every tensor there has a place in the model, with its shape, and every place its tensor."""
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in Transformer(self.config).state_dict().items()}
        expected = {stored.key: stored for stored in layout(self.config)}
        scales = {key + SCALE for key in expected if key + SCALE in self.keys}
        found = {key for key in self.keys if key not in scales and not key.endswith(NO_WEIGHTS)}
        missing = [key for key, stored in expected.items() if key not in found and not stored.copy]
        unknown = sorted(found - expected.keys())
        for what, keys in (("lacks", missing), ("holds, and the model has no place for,", unknown)):
            if keys:
                more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
                raise ConfigError(f"{self.path}: {what} {', '.join(keys[:4])}{more}")
        for key in sorted(found):
            shape = self.files[self.keys[key]].shape(key)
            wanted = stored_shape(expected[key], shapes[expected[key].name])
            if shape != wanted:
                raise ConfigError(f"{self.path}: {key} is {list(shape)}, config.json makes it {list(wanted)}")

    def read(self, key: str) -> Tensor:
        """The tensor, dequantized to fp32 where it is FP8, else as stored."""
        try:
            tensor = self.files[self.keys[key]].tensor(key)
            if key + SCALE in self.keys:
                scales = self.files[self.keys[key + SCALE]].tensor(key + SCALE)
                return dequantize(tensor, scales, self.block_size(), key)
        except READ_ERRORS as error:
            raise ConfigError(f"{self.path}: {key} can't be read ({error})") from error
        if tensor.dtype.itemsize == 1:
            raise ConfigError(f"{self.path}: {key} is {tensor.dtype}, and there is no {key}{SCALE}")
        return tensor

    def block_size(self) -> tuple[int, int]:
        rows, columns = (self.content.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
        return rows, columns

    @torch.no_grad()
    def load_into(self, model: Transformer, place: Place) -> None:
        """Fills the parameters and expert biases that the folder has; place(parameter, expert, draw) writes a matrix.

        Modules beyond the model's MTP depth are left out, and those beyond the folder's stay as they are.
        """
        self.audit()
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        permute = permutation(self.described.interleaved, model.config.rope_interleave)
        rotary = self.config.qk_rope_head_dim
        parts: dict[tuple[str, int | None], list[Stored]] = {}
        for stored in layout(self.config):
            if stored.copy:
                self.check_copy(stored)
            elif stored.name in own:
                parts.setdefault((stored.name, stored.expert), []).append(stored)
        for name, buffer in model.named_buffers():
            if (name, None) not in parts:
                buffer.zero_()  # a family without expert bias
        for (name, expert), group in parts.items():

            def draw(group: list[Stored] = group) -> Tensor:
                return from_disk(group, [self.read(stored.key) for stored in group], rotary, permute)

            place(own[name], expert, draw)

    def check_copy(self, stored: Stored) -> None:
        """A copy is used through its original, so it must be one."""
        original = {s.name: s.key for s in layout(self.config) if not s.copy and s.expert is None}[stored.name]
        if stored.key in self.keys and not torch.equal(self.read(stored.key), self.read(original)):
            raise ConfigError(f"{self.path}: {stored.key} differs from {original}; here they are one parameter")


def dequantize(weight: Tensor, scales: Tensor, block: tuple[int, int], key: str) -> Tensor:
    """fp32: each number times the scale of its block (the released weights' README; the last blocks may be cut)."""
    rows, columns = weight.shape
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    if tuple(scales.shape) != wanted:
        raise ConfigError(f"{key}{SCALE}: is {list(scales.shape)}, blocks of {list(block)} make it {list(wanted)}")
    wide = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * wide


# What a run may set otherwise than the folder it starts from: it changes no tensor, or says which are new.
FREE = ("max_position_embeddings", "rope_theta", "rope_scaling", "initializer_range", "rope_interleave")


def check_same_model(found: ModelConfig, wanted: ModelConfig, path: str | Path) -> list[str]:
    """Raises ConfigError where the weights don't mean what the run's `model` section says; returns what differs.

    FREE settings may differ (a context extension changes two of them), and the depth of MTP.
    """
    notes = []
    for name in wanted.__dataclass_fields__:
        theirs, ours = getattr(found, name), getattr(wanted, name)
        unused = name == "num_key_value_heads" if wanted.attention == "mla" else name in EXPERTS[:-1]
        if theirs == ours or unused and not (name in EXPERTS and wanted.num_moe_layers):
            continue
        if name == "num_nextn_predict_layers":
            new = "the others start anew" if ours > theirs else "the others are left out"
            notes.append(f"model.{name}={ours}: {path} has {theirs}; {new}")
        elif name in FREE:
            notes.append(f"model.{name}={ours}: {path} has {theirs}")
        else:
            raise ConfigError(f"model.{name}={ours}: init_from={path} has {theirs}")
    return notes
