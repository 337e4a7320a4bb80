"""The CLIP text encoder (arXiv 2103.00020); CLIP-L and OpenCLIP bigG are two configurations of it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sd35flash_jax.config import CLIPConfig
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


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": exact_gelu}


class CLIPLayer(nnx.Module):
    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        size = config.hidden_size
        self.heads = config.heads
        self.activation = config.activation
        self.attention_norm = nnx.LayerNorm(size, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs)
        self.qkv = linear(size, 3 * size, rngs=rngs)
        self.out = linear(size, size, rngs=rngs)
        self.feed_forward_norm = nnx.LayerNorm(size, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs)
        self.linear_1 = linear(size, config.feed_forward_size, rngs=rngs)
        self.linear_2 = linear(config.feed_forward_size, size, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        query, key, value = split_heads(self.qkv(self.attention_norm(x)), self.heads)
        x = x + self.out(attention(query, key, value, causal=True))
        return x + self.linear_2(ACTIVATIONS[self.activation](self.linear_1(self.feed_forward_norm(x))))


class CLIPTextEncoder(Model):
    """tokens -> penultimate hidden states and pooled state."""

    STACKS = ("layers",)

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        size = config.hidden_size
        self.config = config
        self.token_embed = embedding(config.vocabulary, size, rngs=rngs)
        self.position_embed = embedding(config.positions, size, rngs=rngs)
        self.layers = stack_blocks(lambda rngs: CLIPLayer(config, rngs=rngs), config.layers, rngs)
        self.final_norm = nnx.LayerNorm(size, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs)
        self.projection = linear(size, config.projection_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> tuple[Float[Array, "b t c"], Float[Array, "b p"]]:
        """Encode token ids, at most `config.positions` of them a row.

        Returns the hidden states before the last layer, `(batch, tokens, hidden_size)`, not normed, and the projected
        final state at the end-of-text token, `(batch, projection_size)`.
        """
        x = embed(self.token_embed, tokens) + embed(self.position_embed, jnp.arange(tokens.shape[1]))
        last, penultimate = scan_blocks(self.layers, (x, x), lambda layer, states: (layer(states[0]), states[0]))
        end = jnp.argmax(tokens if self.config.eos_token_id == 2 else tokens == self.config.eos_token_id, axis=1)
        pooled = self.projection(self.final_norm(last[jnp.arange(tokens.shape[0]), end]))
        return penultimate, pooled
