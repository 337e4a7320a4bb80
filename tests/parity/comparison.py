"""Our module and the reference's with the same weights, and measures of how far apart their outputs are."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx

from conversion import convert
from conversion.diffusers_layout import FOLDERS
from sd35flash_jax.checkpoint import load_checkpoint
from sd35flash_jax.config import ModelConfig
from tests import reference_models

Arrays = Sequence[np.ndarray]


class Pair:
    """One component in both implementations, with the same random weights: the reference's, converted.

    `ours` and `reference` hold the module in each dtype, "float32" and "bfloat16".
    """

    def __init__(self, name: str, config: Any, folder: Path):
        model = reference_models.BUILDERS[name](config)
        model.save_pretrained(folder / "source" / FOLDERS[name])
        converted = convert(folder / "source", folder / "checkpoint")
        assert converted == replace(ModelConfig(), **{name: config})
        self.reference = {"float32": model, "bfloat16": copy.deepcopy(model).to(torch.bfloat16)}
        self.ours = {
            dtype: load_checkpoint(folder / "checkpoint", dtype=dtype).components[name]
            for dtype in ("float32", "bfloat16")
        }


def run_ours(call: Callable[..., Any], module: nnx.Module, inputs: Arrays) -> list[np.ndarray]:
    """`call(module, *inputs)`, compiled; its outputs as float32."""
    outputs = _compiled(call)(module, *inputs)
    return [np.asarray(output, np.float32) for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


_compiled = functools.cache(nnx.jit)


def as_torch(array: np.ndarray, dtype: str = "float32") -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor.long()


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().numpy()


def max_error(ours: np.ndarray, reference: np.ndarray) -> float:
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max())


def rms_error(ours: Arrays, reference: Arrays) -> float:
    """Root mean square over all elements of several arrays."""
    differences = np.concatenate([(a - b).ravel() for a, b in zip(ours, reference, strict=True)])
    return float(np.sqrt(np.square(differences).mean()))


def rounded(array: np.ndarray) -> np.ndarray:
    """The nearest values that bfloat16 holds, so that inputs are the same in both dtypes."""
    return torch.from_numpy(array).bfloat16().float().numpy()


def record_bfloat16(
    record: Callable[..., None],
    item: str,
    ours: dict[str, Arrays],
    reference: dict[str, Arrays],
) -> None:
    """Rounding to bfloat16 must not move our outputs from float32 further than the reference's, by more than a fifth.

    Both arguments hold the outputs for the same inputs by dtype.
    """
    our_error = rms_error(ours["bfloat16"], ours["float32"])
    reference_error = rms_error(reference["bfloat16"], reference["float32"])
    size = rms_error(reference["float32"], [np.zeros_like(array) for array in reference["float32"]])
    record(
        f"{item}, bfloat16 against float32 (RMS)",
        our_error,
        1.2 * reference_error,
        relative=our_error / size,
        reference_itself=f"{reference_error:.1e}",
        ratio=f"{our_error / reference_error:.2f}",
    )
