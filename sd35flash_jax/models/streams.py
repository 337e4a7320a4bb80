"""What the layers of an MMDiT's block hand to one another for each of its streams."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

QUERIES, KEYS, VALUES = range(3)
"""The thirds of a fused projection."""


class Projected(NamedTuple):
    """A stream's share of an attention: a fused projection of queries, keys and values, and the scales of the RMS norms
    of its queries and keys, if it has them."""

    qkv: Float[Array, "b t c3"]
    scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None


class Vectors(NamedTuple):
    """The conditioning's vectors, side by side in a row for each image, and rows for several steps one after another:
    image i of this step has row `first + i`. They are read where they are; cutting a step's rows out takes a copy."""

    rows: Float[Array, "r v"]
    first: Int[Array, ""]

    def of(self, batch: int) -> Float[Array, "b v"]:
        return jax.lax.dynamic_slice_in_dim(self.rows, self.first, batch)


@partial(jax.tree_util.register_dataclass, data_fields=["x", "updates", "vectors"], meta_fields=["gates"])
@dataclass(frozen=True)
class ResidualSum:
    """A stream as a sum that is not taken yet: `x` plus each update times its gate. Gates are named by their place
    among the vectors."""

    x: Float[Array, "b t c"]
    updates: tuple[Float[Array, "b t c"], ...] = ()
    vectors: Vectors | None = None
    gates: tuple[int, ...] = ()


@partial(jax.tree_util.register_dataclass, data_fields=["vectors"], meta_fields=["places"])
@dataclass(frozen=True)
class Norms:
    """Adaptive layer norms (DiT, arXiv 2212.09748, section 3.2) of one input: the places of shift and scale of each
    among the vectors."""

    vectors: Vectors | None = None
    places: tuple[tuple[int, int], ...] = ()
