"""Attention, norms and embeddings that two or more of the models share."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

Block = TypeVar("Block", bound=nnx.Module)


def attention(
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s n d"],
    value: Float[Array, "b s n d"],
    *,
    bias: Float[Array, "1 n t s"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "b t c"]:
    """Softmax attention with heads merged on return; `scale` is 1/sqrt(d) unless given.

    On an NVIDIA GPU cuDNN's flash kernel serves bfloat16 operands without bias and with heads of up to 128;
    everything else, and every other device, takes XLA's own attention.
    """
    options: dict[str, Any] = {"bias": bias, "is_causal": causal, "scale": scale}
    xla = partial(jax.nn.dot_product_attention, implementation="xla", **options)
    cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn", **options)
    if query.dtype == jnp.bfloat16 and bias is None and query.shape[-1] <= 128 and _has_flash_attention():
        mixed = jax.lax.platform_dependent(query, key, value, cuda=cudnn, default=xla)
    else:
        mixed = xla(query, key, value)
    return mixed.reshape(*mixed.shape[:2], -1)


def _has_flash_attention() -> bool:
    """Whether cuDNN has its flash kernel on this machine: an NVIDIA GPU of compute capability 8 or more."""
    device = jax.devices()[0]
    return "cuda" in device.client.platform_version.lower() and float(device.compute_capability) >= 8.0


def split_heads(qkv: Float[Array, "b t c3"], heads: int) -> tuple[Array, Array, Array]:
    """Cut a fused projection into query, key and value of `(batch, tokens, heads, head_size)` each."""
    batch, tokens, width = qkv.shape
    query, key, value = jnp.split(qkv.reshape(batch, tokens, 3 * heads, width // (3 * heads)), 3, axis=2)
    return query, key, value


def embed(table: nnx.Embed, ids: Int[Array, "..."]) -> Float[Array, "... c"]:
    """Rows of a table, in the dtype of its parameters; `nnx.Embed`, called itself, keeps the one it was built in."""
    return jnp.take(table.embedding[...], ids, axis=0)


def adaptive_layer_norm(
    x: Float[Array, "b t c"], shift: Float[Array, "b 1 c"], scale: Float[Array, "b 1 c"]
) -> Float[Array, "b t c"]:
    """Layer norm whose scale and shift come from the conditioning (DiT, arXiv 2212.09748, section 3.2): all of it in
    float32, rounded to the dtype of `x` once."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    return (normed * (1 + scale.astype(jnp.float32)) + shift).astype(x.dtype)


def add_gated(x: Float[Array, "b t c"], gate: Float[Array, "b 1 c"], update: Float[Array, "b t c"]) -> Array:
    """`x + gate * update`, rounded to the dtype of `x` once."""
    return (x.astype(jnp.float32) + gate.astype(jnp.float32) * update).astype(x.dtype)


def sinusoidal_embedding(timestep: Num[Array, " b"], size: int, max_period: float = 10_000.0) -> Float[Array, "b c"]:
    """Sinusoids of a timestep in [0, 1000], cosines first, in float32: `(batch, size)`."""
    half = size // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def stack_blocks(make: Callable[[nnx.Rngs], Block], count: int, rngs: nnx.Rngs) -> Block:
    """Build `count` equal blocks as one module whose parameters have a leading layer axis, for `scan_blocks`."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def scan_blocks(blocks: nnx.Module, carry: Any, apply: Callable[[Any, Any], Any]) -> Any:
    """Run stacked blocks in order: compiled once, whatever their number."""
    return jax.lax.scan(lambda carry, block: (apply(block, carry), None), carry, blocks)[0]
