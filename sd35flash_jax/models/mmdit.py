"""MMDiT and MMDiT-X: the velocity network of Stable Diffusion 3 and 3.5.

Image patches and text tokens are two streams with parameters of their own that meet in every block's joint attention
(SD3 paper, arXiv 2403.03206, figure 2). MMDiT-X, the SD3.5-medium variant, gives the image stream of its first blocks
a second attention among image tokens alone. Shapes: b batch, t tokens, h height, w width, c channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from sd35flash_jax.config import MMDiTConfig
from sd35flash_jax.models.layers import (
    adaptive_layer_norm,
    add_gated,
    attention,
    scan_blocks,
    sinusoidal_embedding,
    split_heads,
    stack_blocks,
)

SINUSOIDS = 256


class Buffer(nnx.Variable):
    """Stored with the parameters, never trained."""


class EmbeddingMLP(nnx.Module):
    """Two layers with a SiLU between: timestep or pooled text -> hidden size."""

    def __init__(self, size: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(size, hidden_size, rngs=rngs)
        self.linear_2 = nnx.Linear(hidden_size, hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b c"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class FeedForward(nnx.Module):
    def __init__(self, size: int, *, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(size, 4 * size, rngs=rngs)
        self.linear_2 = nnx.Linear(4 * size, size, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=True))


class Projection(nnx.Module):
    """One stream's queries, keys and values for an attention, with RMS norms on queries and keys in SD3.5."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = nnx.Linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs)
        self.query_norm = nnx.RMSNorm(config.head_size, epsilon=1e-6, rngs=rngs) if config.qk_norm else nnx.identity
        self.key_norm = nnx.RMSNorm(config.head_size, epsilon=1e-6, rngs=rngs) if config.qk_norm else nnx.identity

    def project(self, x: Float[Array, "b t c"]) -> tuple[Array, Array, Array]:
        query, key, value = split_heads(self.qkv(x), self.heads)
        return self.query_norm(query), self.key_norm(key), value


class StreamAttention(Projection):
    """The same with a projection of what the stream receives."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.out = nnx.Linear(config.hidden_size, config.hidden_size, rngs=rngs)


class PreOnlyStream(nnx.Module):
    """The context's half of the last block: it feeds the attention and ends there, with one shift and scale."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.modulation = nnx.Linear(config.hidden_size, 2 * config.hidden_size, rngs=rngs)
        self.attention = Projection(config, rngs=rngs)


class Stream(nnx.Module):
    """One modality's half of a joint block, modulated by shift, scale and gate of its attention and of its
    feed-forward layer; a dual stream (MMDiT-X) has a second, self-attention, with three more vectors."""

    def __init__(self, config: MMDiTConfig, *, dual: bool = False, rngs: nnx.Rngs):
        size = config.hidden_size
        self.modulation = nnx.Linear(size, (9 if dual else 6) * size, rngs=rngs)
        self.attention = StreamAttention(config, rngs=rngs)
        self.second_attention = StreamAttention(config, rngs=rngs) if dual else None
        self.feed_forward = FeedForward(size, rngs=rngs)

    def update(
        self, x: Float[Array, "b t c"], mixed: Float[Array, "b t c"], vectors: list[Float[Array, "b 1 c"]]
    ) -> Float[Array, "b t c"]:
        """Add what the joint attention brought, then the second attention and the feed-forward layer."""
        gate, shift_ff, scale_ff, gate_ff = vectors[2:6]
        attended = add_gated(x, gate, self.attention.out(mixed))
        if self.second_attention is not None:
            shift, scale, gate = vectors[6:]
            mixed = attention(*self.second_attention.project(adaptive_layer_norm(x, shift, scale)))
            attended = add_gated(attended, gate, self.second_attention.out(mixed))
        fed_forward = self.feed_forward(adaptive_layer_norm(attended, shift_ff, scale_ff))
        return add_gated(attended, gate_ff, fed_forward)


class JointBlock(nnx.Module):
    """Both streams with their joint attention; `condition` has passed its SiLU already."""

    def __init__(self, config: MMDiTConfig, *, dual: bool = False, last: bool = False, rngs: nnx.Rngs):
        self.image = Stream(config, dual=dual, rngs=rngs)
        self.context = PreOnlyStream(config, rngs=rngs) if last else Stream(config, rngs=rngs)

    def __call__(
        self, image: Float[Array, "b t c"], context: Float[Array, "b s c"], condition: Float[Array, "b c"]
    ) -> tuple[Array, Array]:
        image_vectors = modulation_vectors(self.image, condition)
        context_vectors = modulation_vectors(self.context, condition)
        from_image = self.image.attention.project(adaptive_layer_norm(image, *image_vectors[:2]))
        from_context = self.context.attention.project(adaptive_layer_norm(context, *context_vectors[:2]))
        mixed = attention(*(jnp.concatenate(pair, axis=1) for pair in zip(from_image, from_context)))
        to_image, to_context = jnp.split(mixed, [image.shape[1]], axis=1)

        image = self.image.update(image, to_image, image_vectors)
        if isinstance(self.context, Stream):
            context = self.context.update(context, to_context, context_vectors)
        return image, context


def modulation_vectors(stream: Stream | PreOnlyStream, condition: Float[Array, "b c"]) -> list[Float[Array, "b 1 c"]]:
    """Shifts, scales and gates, in the order that `Stream` uses them."""
    vectors = stream.modulation(condition)[:, None]
    return jnp.split(vectors, vectors.shape[-1] // condition.shape[-1], axis=-1)


class MMDiT(nnx.Module):
    """latents, timestep, context, pooled -> velocity."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        size, patch = config.hidden_size, config.patch_size
        self.config = config
        self.patch_embed = nnx.Linear(patch * patch * config.latent_channels, size, rngs=rngs)
        self.position_table = Buffer(sincos_table(config.position_table_side, size, config.position_base))
        self.timestep_embed = EmbeddingMLP(SINUSOIDS, size, rngs=rngs)
        self.pooled_embed = EmbeddingMLP(config.pooled_size, size, rngs=rngs)
        self.context_embed = nnx.Linear(config.context_size, size, rngs=rngs)

        # Equal blocks are stacked and scanned; the last one differs, since its context stream ends in it.
        dual = min(config.dual_attention_blocks, config.depth - 1)
        plain = config.depth - 1 - dual

        def make_dual(rngs: nnx.Rngs) -> JointBlock:
            return JointBlock(config, dual=True, rngs=rngs)

        def make_plain(rngs: nnx.Rngs) -> JointBlock:
            return JointBlock(config, rngs=rngs)

        self.dual_blocks = stack_blocks(make_dual, dual, rngs) if dual else None
        self.blocks = stack_blocks(make_plain, plain, rngs) if plain else None
        self.last_block = JointBlock(config, dual=config.dual_attention_blocks == config.depth, last=True, rngs=rngs)

        self.out_modulation = nnx.Linear(size, 2 * size, rngs=rngs)
        self.out = nnx.Linear(size, patch * patch * config.latent_channels, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "b h w 16"],
        timestep: Num[Array, " b"],
        context: Float[Array, "b t context"],
        pooled: Float[Array, "b pooled"],
    ) -> Float[Array, "b h w 16"]:
        """Predict the velocity, noise - image, of model-scale latents at a timestep in [0, 1000].

        Height and width are even. The result has the parameters' dtype.
        """
        dtype = self.out.kernel.dtype
        height, width = latents.shape[1:3]

        image = self.patch_embed(self.patchify(latents.astype(dtype)))
        image = image + self.positions(height, width)
        text = self.context_embed(context.astype(dtype))
        condition = self.timestep_embed(sinusoidal_embedding(timestep, SINUSOIDS).astype(dtype))
        condition = jax.nn.silu(condition + self.pooled_embed(pooled.astype(dtype)))

        streams = (image, text)
        for blocks in (self.dual_blocks, self.blocks):
            if blocks is not None:
                streams = scan_blocks(blocks, streams, lambda block, streams: block(*streams, condition))
        image, _ = self.last_block(*streams, condition)

        shift, scale = jnp.split(self.out_modulation(condition)[:, None], 2, axis=-1)
        return self.unpatchify(self.out(adaptive_layer_norm(image, shift, scale)), height, width)

    def patchify(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b t p"]:
        """Cut into patches, row by row; a patch's features run over its rows, columns and channels."""
        batch, height, width, channels = latents.shape
        p = self.config.patch_size
        patches = latents.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
        return patches.reshape(batch, -1, p * p * channels)

    def unpatchify(self, patches: Float[Array, "b t p"], height: int, width: int) -> Float[Array, "b h w c"]:
        p = self.config.patch_size
        grid = patches.reshape(patches.shape[0], height // p, width // p, p, p, -1).swapaxes(2, 3)
        return grid.reshape(patches.shape[0], height, width, -1)

    def positions(self, height: int, width: int) -> Float[Array, "t c"]:
        """The centre of the position table, for latents of `(height, width)`.

        Raises:
            ValueError: the latents have more patches a side than the table.
        """
        p, side = self.config.patch_size, self.config.position_table_side
        rows, columns = height // p, width // p
        if max(rows, columns) > side:
            raise ValueError(
                f"latents of {height}x{width} need {max(rows, columns)} positions a side, but the model has {side}: "
                "choose a smaller height or width"
            )
        top, left = (side - rows) // 2, (side - columns) // 2
        crop = self.position_table[top : top + rows, left : left + columns]
        return crop.reshape(rows * columns, -1)


def sincos_table(side: int, channels: int, base: int) -> Float[Array, "h w c"]:
    """2-D sin-cos position embeddings `(side, side, channels)`: half the channels encode the column, half the row,
    each as sines then cosines, at coordinates `index * base / side` (`get_2d_sincos_pos_embed` of diffusers)."""
    quarter = channels // 4
    frequencies = 10_000.0 ** (-jnp.arange(quarter) / quarter)
    angles = jnp.arange(side)[:, None] * (base / side) * frequencies
    line = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    columns = jnp.broadcast_to(line[None, :, :], (side, side, channels // 2))
    rows = jnp.broadcast_to(line[:, None, :], (side, side, channels // 2))
    return jnp.concatenate([columns, rows], axis=-1)
