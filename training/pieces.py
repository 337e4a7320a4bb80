"""Arrays in a folder of small safetensors files, so that what a stretch of training leaves can be moved anywhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

PIECE_BYTES = 15 * 2**20


def save_pieces(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays by name into files of one array, or of more with at most `PIECE_BYTES` in all; earlier files are
    replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    pieces: list[dict[str, np.ndarray]] = [{}]
    room = PIECE_BYTES
    for name, array in sorted(arrays.items()):
        array = np.asarray(array, order="C")
        if pieces[-1] and array.nbytes > room:
            pieces.append({})
            room = PIECE_BYTES
        pieces[-1][name] = array
        room -= array.nbytes
    for number, piece in enumerate(pieces):
        save_file(piece, folder / f"{number:03d}.safetensors")


def load_pieces(folder: Path) -> dict[str, np.ndarray]:
    """Read what `save_pieces` wrote.

    Raises:
        ValueError: the folder holds nothing, or a damaged file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no safetensors files; run the stage of training that writes them first")
    arrays: dict[str, np.ndarray] = {}
    for file in files:
        try:
            arrays |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}); run the stage that writes it again") from None
    return arrays
