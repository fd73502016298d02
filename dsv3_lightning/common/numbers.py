"""Reading and writing of arrays in .npy files."""

from pathlib import Path
from tokenize import TokenError

import numpy as np

from dsv3_lightning.common.files import whole
from dsv3_lightning.errors import ConfigError


def read_numbers(flag: str, path: Path) -> np.ndarray:
    """The array of an .npy file. Raises ConfigError."""
    try:
        with open(path, "rb") as file:  # np.load would also take .npz files and pickles
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, SyntaxError, TokenError) as error:  # a header is Python code
        raise ConfigError(f"{flag} {path}: not a readable .npy file ({error})") from error
    if array.dtype.kind not in "iuf":
        raise ConfigError(f"{flag} {path}: must hold whole or real numbers, holds {array.dtype}")
    return array


def write_numbers(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file atomically. Raises WriteError."""
    array = np.asarray(array, order="C")
    with whole(path) as beside, open(beside, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)  # np.save hides the system's error
