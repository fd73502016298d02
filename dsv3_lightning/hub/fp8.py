"""Block-scaled FP8 weights, with the scales in a separate tensor (README_WEIGHTS.md of V3)."""

from typing import Any

from torch import Tensor

from dsv3_lightning.common.json_files import shown
from dsv3_lightning.errors import ConfigError
from dsv3_lightning.hub.fields import section

SCALE = "_scale_inv"


def block_size(content: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block, from quantization_config in config.json. Raises ConfigError."""
    settings = section(content, "quantization_config")
    if (method := settings.get("quant_method")) not in (None, "fp8"):
        raise ConfigError(f"quantization_config.quant_method={shown(method)}: only fp8 is supported")
    size = settings.get("weight_block_size")
    size = [128, 128] if size is None else size
    if not isinstance(size, list) or len(size) != 2 or not all(is_count(number) for number in size):
        raise ConfigError(f"quantization_config.weight_block_size={shown(size)}: must be two whole numbers above 0")
    return int(size[0]), int(size[1])


def is_count(number: Any) -> bool:
    return type(number) in (int, float) and number > 0 and float(number).is_integer()


def check_scales(key: str, shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> None:
    """Raises ConfigError unless a weight has one scale for each block."""
    if len(shape) != 2:
        raise ConfigError(f"{key}: is FP8 {list(shape)}; only matrices can have a scale for each block")
    wanted = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    if scales != wanted:
        raise ConfigError(
            f"{key}{SCALE}: is {list(scales)}, blocks of {list(block)} (quantization_config.weight_block_size) make it "
            f"{list(wanted)}"
        )


def dequantize(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The weight in fp32: each number times the scale of its block. The last blocks may be partial."""
    rows, columns = weight.shape
    wide = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * wide
