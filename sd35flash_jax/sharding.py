"""Training on several devices: a mesh, and the one table that says which axis of a parameter is cut over it.

The mesh has two axes. `fsdp` devices hold a part of every large parameter each, with its gradient, optimizer moments
and averages (fully sharded data parallelism: ZeRO, arXiv 1910.02054); XLA gathers a layer's parameters where it is
evaluated. `data` groups of so many devices hold the same parts. The rows of a batch are cut over all devices.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"position_table", (None, None, "fsdp")),
    (r".*kernel\.b", (None, "fsdp")),  # a LoRA's second factor, (rank, out)
    (r".*kernel(\.a)?", ("fsdp", None)),  # kernels (in, out), those of the heads too, and a LoRA's first factor
    (r".*", ()),  # biases and norms
)
"""A parameter's dotted path as a pattern, and how its last axes are cut; the first rule that fits holds, and axes
before them (layers, heads) are whole."""

ROWS = ("data", "fsdp")
"""The axis of a batch's rows is cut over both axes of the mesh."""


def make_mesh(fsdp: int) -> Mesh:
    """All devices, of all processes, as `(data, fsdp)`.

    Raises:
        ValueError: the devices do not divide into groups of `fsdp`.
    """
    count = len(jax.devices())
    if count % fsdp:
        raise ValueError(f"{count} devices do not divide into groups of sharding.fsdp={fsdp}; choose a divisor")
    return jax.make_mesh((count // fsdp, fsdp), ROWS, axis_types=(AxisType.Auto, AxisType.Auto))


def partition(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """How the table cuts the parameter at a dotted path."""
    last = next(axes for pattern, axes in RULES if re.fullmatch(pattern, path))
    return PartitionSpec(*(None,) * (len(shape) - len(last)), *last)


def parameter_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """The sharding of every leaf of a tree that holds dictionaries of arrays by dotted path, such as parameters,
    optimizer states and whole training states; other leaves are whole on every device.

    Raises:
        ValueError: an axis does not divide over its devices.
    """

    def shard(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [key.key for key in keys if isinstance(key, jax.tree_util.DictKey)]
        spec = partition(names[-1], leaf.shape) if names else PartitionSpec()
        for axis, size in zip(spec, leaf.shape):
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"{names[-1]} of shape {leaf.shape} does not divide over sharding.fsdp={mesh.shape[axis]} devices; "
                    "choose another number"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(shard, tree)


def row_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows on an axis, over all devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put(array: np.ndarray, sharding: NamedSharding) -> Array:
    """An array that every process has whole, in the parts that its own devices need."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
