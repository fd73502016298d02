"""Reading of a Hugging Face folder, one tensor at a time, with dequantization of FP8 blocks."""

import re
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dsv3_lightning.common.json_files import read_json
from dsv3_lightning.common.paths import user_path
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.config import EXPERTS, Described, from_json
from dsv3_lightning.hub.fp8 import SCALE, block_size, check_scales, dequantize
from dsv3_lightning.hub.layout import Stored, from_disk, layout, permutation, stored_shape
from dsv3_lightning.hub.weights import NARROW, READ_ERRORS, WIDE, choose_weights, open_weights
from dsv3_lightning.model.config import ModelConfig
from dsv3_lightning.model.init import Fill
from dsv3_lightning.model.transformer import Transformer

NO_WEIGHTS = ("rotary_emb.inv_freq",)  # rotary frequencies in older Llama-style files


class WeightSource(Protocol):
    """What a run can start from: a Hugging Face folder, or another run (runs/start.py). Errors are ConfigErrors."""

    config: ModelConfig
    notes: list[str]

    def audit(self) -> None:
        """Raises ConfigError where the weights are not those of `config`."""

    def load_into(self, model: Transformer, fill: Fill) -> None:
        """Fills the parameters and expert biases; fill(parameter, expert, draw) writes a matrix."""


class HubFolder:
    """A folder with config.json and weights, with or without an index. All methods raise ConfigError."""

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        file = self.path / "config.json"
        if not file.exists() and (self.path / "config.yaml").is_file():
            raise ConfigError(
                f"{self.path}: is a run's folder, which needs no import: init_from={self.path} starts another run"
            )
        content = read_json(file)
        described = from_json(content, str(file))
        try:
            self.block = block_size(content)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error
        chosen = choose_weights(self.path)
        self.files = open_weights(self.path, chosen.names)
        self.notes = [*described.notes, *chosen.notes]
        self.described = self.without_absent_mtp(described)
        self.config = self.described.config

    @cached_property
    def keys(self) -> dict[str, str]:
        """The file of each tensor, by key. Raises ConfigError for a key in two files."""
        found: dict[str, str] = {}
        for name, file in self.files.items():
            for key in file.keys():  # noqa: SIM118
                if key in found:
                    raise ConfigError(f"{self.path}: {key} is in {found[key]} and in {name}")
                found[key] = name
        return found

    def without_absent_mtp(self, described: Described) -> Described:
        """The description without MTP modules if the weights lack them, as those of some conversions do."""
        config = described.config
        first = f"model.layers.{config.num_hidden_layers}."
        if not config.mtp_depth or any(key.startswith(first) for key in self.keys):
            return described
        self.notes.append(f"{self.path}: config.json names {config.mtp_depth} MTP modules, the weights hold none")
        fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
        return described._replace(config=ModelConfig(**fields | {"num_nextn_predict_layers": 0}))

    def audit(self) -> None:
        """Raises ConfigError unless names and shapes of the tensors are exactly those that the model needs."""
        shapes = self.shapes()
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
            self.check_numbers(key)
        self.tell_unused(sorted(key for key in scales if not self.is_narrow(key.removesuffix(SCALE))))

    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the model's parameters and buffers. Raises ConfigError if the weights lack layers or experts."""
        config = self.config
        for kind, name, wanted in (
            (r"model\.layers\.(\d{1,9})\.", "num_hidden_layers", config.num_hidden_layers + config.mtp_depth),
            (r"\.experts\.(\d{1,9})\.", "n_routed_experts", config.n_routed_experts if config.num_moe_layers else 0),
        ):
            there = 1 + max((int(match[1]) for key in self.keys if (match := re.search(kind, key))), default=-1)
            if wanted > there:
                modules = f" and {config.mtp_depth} MTP modules" if "layers" in name and config.mtp_depth else ""
                what = f"{name}={getattr(config, name)}{modules}"
                raise ConfigError(f"{self.path / 'config.json'}: {what}: the weights hold {there}")
        try:
            with torch.device("meta"):
                return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
        except RuntimeError as error:
            raise ConfigError(f"{self.path / 'config.json'}: no tensors have such sizes ({error})") from error

    def is_narrow(self, key: str) -> bool:
        return key in self.keys and self.files[self.keys[key]].dtype(key) in NARROW

    def check_numbers(self, key: str) -> None:
        """Raises ConfigError for a tensor without floating-point numbers, or FP8 without a scale for each block."""
        file = self.files[self.keys[key]]
        if self.is_narrow(key):
            scales = self.keys.get(key + SCALE)
            if scales is None:
                raise ConfigError(f"{self.path}: {key} is FP8 ({file.dtype(key)}), and there is no {key}{SCALE}")
            if self.files[scales].dtype(key + SCALE) not in WIDE:
                raise ConfigError(
                    f"{self.path}: {key}{SCALE} is {self.files[scales].dtype(key + SCALE)}, not real numbers"
                )
            try:
                check_scales(key, file.shape(key), self.files[scales].shape(key + SCALE), self.block)
            except ConfigError as error:
                raise ConfigError(f"{self.path}: {error}") from error
        elif file.dtype(key) not in WIDE:
            raise ConfigError(f"{self.path}: {key} is {file.dtype(key)}; read are {', '.join((*WIDE, *NARROW))}")

    def tell_unused(self, scales: list[str]) -> None:
        """Adds a note about unused scales, which conversions from FP8 often leave behind."""
        if scales:
            note = f"{self.path}: not used: {len(scales)} scales of numbers that are not FP8, such as {scales[0]}"
            self.notes += [note] if note not in self.notes else []

    def read(self, key: str) -> Tensor:
        """The tensor, dequantized to fp32 if it is FP8, else as stored."""
        try:
            tensor = self.files[self.keys[key]].tensor(key)
            if not self.is_narrow(key):
                return tensor
            return dequantize(tensor, self.files[self.keys[key + SCALE]].tensor(key + SCALE), self.block)
        except READ_ERRORS as error:
            raise ConfigError(f"{self.path}: {key} can't be read ({error})") from error

    @torch.no_grad()
    def load_into(self, model: Transformer, fill: Fill) -> None:
        """Fills the parameters and expert biases that the folder has; fill(parameter, expert, draw) writes a matrix.

        MTP modules beyond the model's depth are skipped, and those beyond the folder's keep their values.
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
                buffer.zero_()  # families without expert bias
        for (name, expert), group in parts.items():

            def draw(group: list[Stored] = group) -> Tensor:
                return from_disk(group, [self.read(stored.key) for stored in group], rotary, permute)

            fill(own[name], expert, draw)

    def check_copy(self, stored: Stored) -> None:
        """Raises ConfigError if a copied tensor differs from its original, which is used in its place."""
        original = {s.name: s.key for s in layout(self.config) if not s.copy and s.expert is None}[stored.name]
        if stored.key in self.keys and not torch.equal(self.read(stored.key), self.read(original)):
            raise ConfigError(f"{self.path}: {stored.key} differs from {original}; here they are one parameter")


# Settings that may differ from the folder that a run starts from, since they change no tensor.
MAY_DIFFER = ("max_position_embeddings", "rope_theta", "rope_scaling", "initializer_range", "rope_interleave")


def check_same_model(found: ModelConfig, wanted: ModelConfig, path: str | Path) -> list[str]:
    """Raises ConfigError unless the weights fit the run's `model` section; returns notes about differences.

    MAY_DIFFER settings (a context extension changes two of them) and the MTP depth may differ.
    """
    notes = []
    for name in wanted.__dataclass_fields__:
        theirs, ours = getattr(found, name), getattr(wanted, name)
        unused = name == "num_key_value_heads" if wanted.attention == "mla" else name in EXPERTS[:-1]
        if theirs == ours or unused and not (name in EXPERTS and wanted.num_moe_layers):
            continue
        if name == "num_nextn_predict_layers":
            new = "the others start from random weights" if ours > theirs else "the others are left out"
            notes.append(f"model.{name}={ours}: {path} has {theirs}; {new}")
        elif name in MAY_DIFFER:
            notes.append(f"model.{name}={ours}: {path} has {theirs}")
        else:
            raise ConfigError(f"model.{name}={ours}: init_from={path} has {theirs}")
    return notes
