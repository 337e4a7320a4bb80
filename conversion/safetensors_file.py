"""Safetensors files as named tensors on disk: headers are read at once, data only when asked for, and written in a
stream."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sd35flash_jax.config import read_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file. `read` maps it into memory, without a copy, or multiplies it by its scale in float32."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    scale: "Tensor | None" = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_fp8(self) -> bool:
        return self.dtype == DTYPES["F8_E4M3"]

    def read(self) -> np.ndarray:
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        # A map of one dimension at least: NumPy takes the shape () for "the whole file".
        stored = np.memmap(self.file, self.dtype, "r", self.offset, self.shape or (1,)).reshape(self.shape)
        if self.scale is None:
            return stored
        return stored.astype(np.float32) * self.scale.read().astype(np.float32).reshape(())


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file by name.

    Raises:
        ValueError: the file is missing, truncated or damaged, or holds a dtype that is not supported.
    """
    try:
        # The library checks the header, that offsets neither overlap nor leave gaps, and the file's length.
        with safe_open(file, framework="numpy") as checked:
            names = set(checked.keys())
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); download it again") from None
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    unsupported = sorted({header[name]["dtype"] for name in names} - set(DTYPES))
    if unsupported:
        raise ValueError(f"{file} holds tensors of dtype {', '.join(unsupported)}, which is not supported")
    return {
        name: Tensor(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name in names
    }


def find_weights(folder: Path, stem: str) -> list[Path]:
    """The weight files of a diffusers component folder: `stem.safetensors`, or the shards its index names; the fp16
    or bf16 variant where there is no other.

    Raises:
        ValueError: there are none, they are in a pickle format, or the index is damaged or names files elsewhere.
    """
    for infix in ("", ".fp16", ".bf16"):
        whole = folder / f"{stem}{infix}.safetensors"
        if whole.is_file():
            return [whole]
        index = folder / f"{stem}.safetensors.index{infix}.json"
        if index.is_file():
            return _shards(index)
    pickles = [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as pickles ({pickles[0]}), which can run code when opened and are refused; "
            "save them with save_pretrained(..., safe_serialization=True) and convert the result"
        )
    raise ValueError(f"{folder} holds no weights ({stem}.safetensors or its index)")


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names; download it again")
    files = sorted(set(names.values()))
    outside = [name for name in files if os.path.basename(name) != name]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file beside it")
    return [index.parent / name for name in files]


def open_all(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of several shards.

    Raises:
        ValueError: as `open_safetensors`, or a tensor stands in two files.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = open_safetensors(file)
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise ValueError(f"{twice[0]} stands both in {tensors[twice[0]].file} and in {file}")
        tensors |= found
    return tensors


def write_safetensors(
    file: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]
) -> None:
    """Write a new file tensor by tensor: a header of names, dtypes and shapes, then `arrays` in the same order."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # Readers ask for the framework that wrote the file: transformers refuses one that does not say.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "xb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for array in arrays:
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
