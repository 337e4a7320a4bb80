"""The T5 v1.1 encoder (arXiv 1910.10683; v1.1 gates its feed-forward layer and has no biases)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sd35flash_jax.config import T5Config
from sd35flash_jax.models.layers import (
    Model,
    attention,
    embed,
    embedding,
    linear,
    scan_blocks,
    split_heads,
    stack_blocks,
)


class T5Layer(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        size, inner = config.hidden_size, config.heads * config.head_size
        self.heads = config.heads
        self.attention_norm = nnx.RMSNorm(size, epsilon=config.norm_epsilon, rngs=rngs)
        self.qkv = linear(size, 3 * inner, use_bias=False, rngs=rngs)
        self.out = linear(inner, size, use_bias=False, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(size, epsilon=config.norm_epsilon, rngs=rngs)
        self.gate = linear(size, config.feed_forward_size, use_bias=False, rngs=rngs)
        self.up = linear(size, config.feed_forward_size, use_bias=False, rngs=rngs)
        self.down = linear(config.feed_forward_size, size, use_bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"], bias: Float[Array, "1 n t t"]) -> Float[Array, "b t c"]:
        query, key, value = split_heads(self.qkv(self.attention_norm(x)), self.heads)
        x = x + self.out(attention(query, key, value, bias=bias, scale=1.0))
        normed = self.feed_forward_norm(x)
        return x + self.down(jax.nn.gelu(self.gate(normed), approximate=True) * self.up(normed))


class T5Encoder(Model):
    """tokens -> hidden states. Padding is attended to, as in the SD3 reference."""

    STACKS = ("layers",)

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embed = embedding(config.vocabulary, config.hidden_size, rngs=rngs)
        self.relative_attention_bias = embedding(config.position_buckets, config.heads, rngs=rngs)
        self.layers = stack_blocks(lambda rngs: T5Layer(config, rngs=rngs), config.layers, rngs)
        self.final_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t c"]:
        """Encode token ids into `(batch, tokens, hidden_size)`; any number of tokens."""
        buckets = position_buckets(tokens.shape[1], self.config.position_buckets, self.config.position_max_distance)
        bias = embed(self.relative_attention_bias, jnp.asarray(buckets)).transpose(2, 0, 1)[None]
        x = scan_blocks(self.layers, embed(self.token_embed, tokens), lambda layer, x: layer(x, bias))
        return self.final_norm(x)


def position_buckets(tokens: int, buckets: int, max_distance: int) -> Int[np.ndarray, "t t"]:
    """Bucket of each (query, key) offset: exact up to a quarter of the buckets either way, then logarithmic."""
    offset = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(offset)
    ratio = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (ratio.astype(np.float32) * (half - exact)).astype(np.int32), half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)
