"""The vocabulary of the conversion tables: which source tensors make which parameter, and how, both ways."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """How source tensors become one parameter.

    `forward` takes the source tensors, `backward` the parameter and the number of sources; `source_shapes` gives the
    shapes the sources must have for a parameter of a given shape.
    """

    forward: Callable[[Sequence[np.ndarray]], np.ndarray]
    backward: Callable[[np.ndarray, int], Sequence[np.ndarray]]
    source_shapes: Callable[[Shape, int], Sequence[Shape]]


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


IDENTITY = Transform(
    lambda arrays: arrays[0],
    lambda array, count: [array],
    lambda shape, count: [shape],
)
"""One tensor, as it is."""

JOIN = Transform(
    _joined,
    lambda array, count: np.split(array, count),
    lambda shape, count: [(shape[0] // count,)] * count,
)
"""Vectors put end to end: the biases of a fused projection."""


_ROWS_AT_ONCE = 64
_PADDING = 64  # bytes


def transposed(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The transpose of matrices put end to end.

    NumPy copies a transpose line by line, which is slow where the lines fall into the same few sets of the processor's
    cache, as those of a width of 4096 do. So a few rows at a time are first copied to rows of an odd length; and as
    plain integers, which NumPy moves faster than the dtypes of ml_dtypes.
    """
    rows, columns = sum(len(array) for array in arrays), arrays[0].shape[1]
    dtype = arrays[0].dtype
    plain = np.dtype(f"u{dtype.itemsize}")
    result = np.empty((columns, rows), plain)
    panel = np.empty((_ROWS_AT_ONCE, columns + _PADDING // plain.itemsize), plain)[:, :columns]
    column = 0
    for array in arrays:
        for start in range(0, len(array), _ROWS_AT_ONCE):
            block = array[start : start + _ROWS_AT_ONCE].view(plain)
            panel[: len(block)] = block
            result[:, column : column + len(block)] = panel[: len(block)].T
            column += len(block)
    return result.view(dtype)


KERNEL = Transform(
    transposed,
    lambda array, count: np.split(transposed([array]), count),
    lambda shape, count: [(shape[1] // count, shape[0])] * count,
)
"""Linear weights `(out, in)`, put end to end on their outputs, to one kernel `(in, out)`."""

CONVOLUTION = Transform(
    lambda arrays: arrays[0].transpose(2, 3, 1, 0),
    lambda array, count: [array.transpose(3, 2, 0, 1)],
    lambda shape, count: [(shape[3], shape[2], shape[0], shape[1])],
)
"""A convolution's weight `(out, in, h, w)` to `(h, w, in, out)`."""


POINTWISE = Transform(
    lambda arrays: KERNEL.forward([array[:, :, 0, 0] for array in arrays]),
    lambda array, count: [part[:, :, None, None] for part in KERNEL.backward(array, count)],
    lambda shape, count: [(*part, 1, 1) for part in KERNEL.source_shapes(shape, count)],
)
"""1x1 convolutions `(out, in, 1, 1)`, put end to end on their outputs, to one linear kernel `(in, out)`."""


def swap_halves(array: np.ndarray) -> np.ndarray:
    first, second = np.split(array, 2)
    return np.concatenate([second, first])


SWAPPED_JOIN = Transform(
    lambda arrays: swap_halves(arrays[0]),
    lambda array, count: [swap_halves(array)],
    lambda shape, count: [shape],
)
SWAPPED_KERNEL = Transform(
    lambda arrays: transposed(np.split(arrays[0], 2)[::-1]),
    lambda array, count: [swap_halves(transposed([array]))],
    lambda shape, count: [shape[::-1]],
)
"""Scale and shift stored in the other order, bias and weight: the final norm's modulation in the diffusers layout."""


def patch_kernel(patch: int, channels: int) -> Transform:
    """A patch convolution's weight `(out, channels, patch, patch)` to a linear kernel over flattened patches."""
    return Transform(
        lambda arrays: arrays[0].transpose(2, 3, 1, 0).reshape(patch * patch * channels, -1),
        lambda array, count: [array.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)],
        lambda shape, count: [(shape[1], channels, patch, patch)],
    )


def square_table(side: int) -> Transform:
    """A position table `(1, side * side, channels)` to `(side, side, channels)`."""
    return Transform(
        lambda arrays: arrays[0].reshape(side, side, -1),
        lambda array, count: [array.reshape(1, side * side, -1)],
        lambda shape, count: [(1, side * side, shape[2])],
    )


@dataclass(frozen=True)
class Rule:
    """One parameter, or one layer of a stacked parameter, and the source tensors that make it."""

    param: str
    sources: tuple[str, ...]
    transform: Transform
    layer: int | None = None


@dataclass(frozen=True)
class Table:
    """A component's whole correspondence.

    `aliases` are second names under which some files repeat a tensor, `repeated` those among them that are written too,
    because readers differ in the name they look for. `ignored` tensors hold no parameter. `optional` tensors may be
    missing: from its shape, each function makes what a missing one stands for.
    """

    rules: list[Rule]
    aliases: dict[str, str] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    optional: dict[str, Callable[[Shape], np.ndarray]] = field(default_factory=dict)


def linear(param: str, *sources: str, bias: bool = True) -> list[Rule]:
    rules = [Rule(f"{param}.kernel", tuple(f"{source}.weight" for source in sources), KERNEL)]
    if bias:
        rules.append(Rule(f"{param}.bias", tuple(f"{source}.bias" for source in sources), JOIN))
    return rules


def swapped_linear(param: str, source: str) -> list[Rule]:
    return [
        Rule(f"{param}.kernel", (f"{source}.weight",), SWAPPED_KERNEL),
        Rule(f"{param}.bias", (f"{source}.bias",), SWAPPED_JOIN),
    ]


def conv(param: str, source: str) -> list[Rule]:
    return [
        Rule(f"{param}.kernel", (f"{source}.weight",), CONVOLUTION),
        Rule(f"{param}.bias", (f"{source}.bias",), IDENTITY),
    ]


def pointwise(param: str, *sources: str) -> list[Rule]:
    return [
        Rule(f"{param}.kernel", tuple(f"{source}.weight" for source in sources), POINTWISE),
        Rule(f"{param}.bias", tuple(f"{source}.bias" for source in sources), JOIN),
    ]


def norm(param: str, source: str, bias: bool = True) -> list[Rule]:
    rules = [Rule(f"{param}.scale", (f"{source}.weight",), IDENTITY)]
    if bias:
        rules.append(Rule(f"{param}.bias", (f"{source}.bias",), IDENTITY))
    return rules


def embedding(param: str, source: str) -> list[Rule]:
    return [Rule(f"{param}.embedding", (f"{source}.weight",), IDENTITY)]


def under(param: str, source: str, rules: Iterable[Rule]) -> list[Rule]:
    """The same rules one level down: `param` and `source` are put before every name, each with its dot."""
    return [
        replace(rule, param=param + rule.param, sources=tuple(source + name for name in rule.sources)) for rule in rules
    ]


def stacked(param: str, source: str, layers: range, rules: list[Rule]) -> list[Rule]:
    """The rules of one layer for every layer of a stack; `source` holds `{}` where the layer's number stands."""
    return [
        replace(rule, layer=layer)
        for layer, number in enumerate(layers)
        for rule in under(param, source.format(number), rules)
    ]
