"""Symmetric int8 storage of weights: a byte a value and a float32 scale for each channel."""

import numpy as np
from jaxtyping import Float, Int8, Num

_LARGEST = 127


def quantize(
    array: Num[np.ndarray, "..."], shared: tuple[int, ...], name: str = "the array"
) -> tuple[Int8[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Finite weights as int8 values in [-127, 127] and their float32 scales.

    Values along the axes `shared` have one scale, which keeps these axes with length 1. What `dequantize` makes of both
    is nowhere further from `array` than half a scale, but for float32's rounding, and zeros stay zeros. `name` is what
    an error calls the weights.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    wide = np.asarray(array, np.float32)
    bad = np.count_nonzero(~np.isfinite(wide))
    if bad:
        raise ValueError(
            f"{name} has {bad} of {wide.size} weights that are NaN or infinite, which int8 cannot store; check what "
            "made them"
        )
    largest = np.abs(wide).max(axis=shared, keepdims=True)
    # The smallest normal number keeps a channel of zeros from being divided by zero.
    scales = np.maximum(largest / np.float32(_LARGEST), np.finfo(np.float32).tiny)
    return np.rint(wide / scales).astype(np.int8), scales


def dequantize(values: Int8[np.ndarray, "..."], scales: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The float32 weights that int8 values stand for; `scales` broadcasts against them."""
    return values.astype(np.float32) * scales
