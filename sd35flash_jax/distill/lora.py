"""A LoRA (arXiv 2106.09685) as what is trained: `kernel + a b` for every kernel of the transformer's blocks."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Params = dict[str, Array]
BLOCKS = ("blocks.", "dual_blocks.", "last_block.")


def init_lora(key: Array, kernels: Params, rank: int) -> Params:
    """`a` `(..., in, rank)` random and `b` `(..., rank, out)` zero, float32, for every kernel of the blocks, so that
    nothing is changed at first."""
    chosen = [path for path in sorted(kernels) if path.startswith(BLOCKS) and path.endswith(".kernel")]
    lora = {}
    for path, path_key in zip(chosen, jax.random.split(key, len(chosen))):
        *layers, inputs, outputs = kernels[path].shape
        lora[f"{path}.a"] = jax.random.normal(path_key, (*layers, inputs, rank)) / np.sqrt(inputs)
        lora[f"{path}.b"] = jnp.zeros((*layers, rank, outputs))
    return lora


def merge_lora(base: Params, lora: Params) -> Params:
    """The base with `a b` added to the kernels that the LoRA has, in the base's dtype."""
    merged = dict(base)
    for path in sorted({name.rpartition(".")[0] for name in lora}):
        factors = (base[path], lora[f"{path}.a"], lora[f"{path}.b"])
        # Of a stack one layer after another: its products and their gradients are float32, and twice its own size.
        merged[path] = jax.lax.map(_merged, factors) if base[path].ndim > 2 else _merged(factors)
    return merged


def _merged(factors: tuple[Array, Array, Array]) -> Array:
    kernel, a, b = factors
    return (kernel.astype(jnp.float32) + a @ b).astype(kernel.dtype)
