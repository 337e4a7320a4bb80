"""MMDiT and MMDiT-X: the velocity network of Stable Diffusion 3 and 3.5.

Image patches and text tokens are two streams with parameters of their own that meet in every block's joint attention
(SD3 paper, arXiv 2403.03206, figure 2). MMDiT-X, the SD3.5-medium variant, gives the image stream of its first blocks
a second attention among image tokens alone. Shapes: b batch, t tokens, h height, w width, c channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from sd35flash_jax.config import MMDiTConfig
from sd35flash_jax.models.layers import (
    Model,
    add_and_norm,
    joint_attention,
    linear,
    map_blocks,
    scan_blocks,
    sinusoidal_embedding,
    stack_blocks,
)
from sd35flash_jax.models.streams import Norms, Projected, ResidualSum, Vectors

SINUSOIDS = 256
ROWS_ALIGNED = 8


class Buffer(nnx.Variable):
    """Stored with the parameters, never trained."""


class EmbeddingMLP(nnx.Module):
    """Two layers with a SiLU between: timestep or pooled text -> hidden size."""

    def __init__(self, size: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.linear_1 = linear(size, hidden_size, rngs=rngs)
        self.linear_2 = linear(hidden_size, hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b c"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class FeedForward(nnx.Module):
    def __init__(self, size: int, *, rngs: nnx.Rngs):
        self.linear_1 = linear(size, 4 * size, rngs=rngs)
        self.linear_2 = linear(4 * size, size, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(x), approximate=True))


class HeadNorm(nnx.Module):
    """The scale of an RMS norm over a head's features; `joined_heads` takes the norm."""

    def __init__(self, size: int):
        self.scale = nnx.Param(jnp.ones(size))


class Projection(nnx.Module):
    """One stream's queries, keys and values for an attention, with RMS norms on queries and keys in SD3.5."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs)
        self.query_norm = HeadNorm(config.head_size) if config.qk_norm else None
        self.key_norm = HeadNorm(config.head_size) if config.qk_norm else None

    def project(self, x: Float[Array, "b t c"]) -> Projected:
        scales = (self.query_norm.scale[...], self.key_norm.scale[...]) if self.query_norm and self.key_norm else None
        return Projected(self.qkv(x), scales)


class StreamAttention(Projection):
    """The same with a projection of what the stream receives."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.out = linear(config.hidden_size, config.hidden_size, rngs=rngs)


class PreOnlyStream(nnx.Module):
    """The context's half of the last block: it feeds the attention and ends there, with one shift and scale."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.modulation = linear(config.hidden_size, 2 * config.hidden_size, rngs=rngs)
        self.attention = Projection(config, rngs=rngs)


SHIFT, SCALE, GATE, SHIFT_FF, SCALE_FF, GATE_FF, SHIFT_2, SCALE_2, GATE_2 = range(9)
"""A stream's modulation, in the order of its vectors: of its attention, its feed-forward layer, and in MMDiT-X its
second attention."""


class Stream(nnx.Module):
    """One modality's half of a joint block; a dual stream (MMDiT-X) has a second, self-attention."""

    def __init__(self, config: MMDiTConfig, *, dual: bool = False, rngs: nnx.Rngs):
        size = config.hidden_size
        self.modulation = linear(size, (9 if dual else 6) * size, rngs=rngs)
        self.attention = StreamAttention(config, rngs=rngs)
        self.second_attention = StreamAttention(config, rngs=rngs) if dual else None
        self.feed_forward = FeedForward(size, rngs=rngs)

    def with_attention(
        self,
        x: Float[Array, "b t c"],
        mixed: Float[Array, "b t c"],
        vectors: Vectors,
        second_input: Float[Array, "b t c"] | None = None,
    ) -> ResidualSum:
        """Add what the joint attention brought and, of its own input, what the second attention brings."""
        updates = [self.attention.out(mixed)]
        if self.second_attention is not None and second_input is not None:
            projected = self.second_attention.project(second_input)
            [second] = joint_attention([projected], self.second_attention.heads, x.shape[1])
            updates.append(self.second_attention.out(second))
        return ResidualSum(x, tuple(updates), vectors, (GATE, GATE_2)[: len(updates)])


Streams = tuple[ResidualSum, ...]
"""The image's, then the context's, which ends in the last block."""


class JointBlock(nnx.Module):
    """Both streams with their joint attention."""

    def __init__(self, config: MMDiTConfig, *, dual: bool = False, last: bool = False, rngs: nnx.Rngs):
        self.image = Stream(config, dual=dual, rngs=rngs)
        self.context = PreOnlyStream(config, rngs=rngs) if last else Stream(config, rngs=rngs)

    def modulate(self, condition: Float[Array, "b c"]) -> tuple[Float[Array, "b v"], Float[Array, "b v"]]:
        """Both streams' shifts, scales and gates side by side; `condition` has passed its SiLU already."""
        return self.image.modulation(condition), self.context.modulation(condition)

    def __call__(self, streams: Streams, modulation: tuple[Vectors, Vectors], context_tokens: int) -> Streams:
        """Of the context, the first `context_tokens` rows are attended to. A block's last sums are left to be taken
        with the next one's norms."""
        halves = self.image, self.context
        inputs = (SHIFT, SCALE), (SHIFT_2, SCALE_2)
        places = inputs[: 1 + (self.image.second_attention is not None)], inputs[:1]
        normed = add_and_norm(streams, [Norms(*each) for each in zip(modulation, places)])
        projected = [half.attention.project(first) for half, (_, [first, *_]) in zip(halves, normed)]
        keys = streams[0].x.shape[1] + context_tokens
        mixed = joint_attention(projected, self.image.attention.heads, keys)

        going_on = [half for half in halves if isinstance(half, Stream)]
        sums = [
            half.with_attention(x, own_mixed, vectors, *second)
            for half, (x, [_, *second]), own_mixed, vectors in zip(going_on, normed, mixed, modulation)
        ]
        norms = [Norms(vectors, ((SHIFT_FF, SCALE_FF),)) for vectors in modulation[: len(sums)]]
        return tuple(
            ResidualSum(x, (half.feed_forward(first),), vectors, (GATE_FF,))
            for half, (x, [first]), vectors in zip(going_on, add_and_norm(sums, norms), modulation)
        )


def taken(streams: Streams) -> Streams:
    """The same streams with nothing left to add."""
    return tuple(ResidualSum(x) for x, _ in add_and_norm(streams, [Norms()] * len(streams)))


class Modulation(NamedTuple):
    """Every vector that depends on timestep and pooled text alone: for each block what `JointBlock.modulate` gives,
    and shift and scale of the final norm."""

    dual_blocks: Any
    blocks: Any
    last_block: Any
    out: Float[Array, "b c2"]


def from_row(first: Int[Array, ""] | int, modulation: Any) -> Any:
    """The vectors of each image, given rows for several steps."""
    return jax.tree.map(lambda rows: Vectors(rows, jnp.int32(first)), modulation)


class MMDiT(Model):
    """latents, timestep, context, pooled -> velocity."""

    STACKS = ("dual_blocks", "blocks")

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        size, patch = config.hidden_size, config.patch_size
        self.config = config
        self.patch_embed = linear(patch * patch * config.latent_channels, size, rngs=rngs)
        self.position_table = Buffer(sincos_table(config.position_table_side, size, config.position_base))
        self.timestep_embed = EmbeddingMLP(SINUSOIDS, size, rngs=rngs)
        self.pooled_embed = EmbeddingMLP(config.pooled_size, size, rngs=rngs)
        self.context_embed = linear(config.context_size, size, rngs=rngs)

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

        self.out_modulation = linear(size, 2 * size, rngs=rngs)
        self.out = linear(size, patch * patch * config.latent_channels, rngs=rngs)

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
        return self.predict(latents, context, self.modulate(timestep, pooled))

    def modulate(self, timestep: Num[Array, " b"], pooled: Float[Array, "b pooled"]) -> Modulation:
        """The part that needs no latents: all steps of a schedule can take it at once."""
        dtype = self.out.kernel.dtype
        condition = self.timestep_embed(sinusoidal_embedding(timestep, SINUSOIDS).astype(dtype))
        condition = jax.nn.silu(condition + self.pooled_embed(pooled.astype(dtype)))
        dual, plain = (
            None if blocks is None else map_blocks(blocks, lambda block: block.modulate(condition))
            for blocks in (self.dual_blocks, self.blocks)
        )
        return Modulation(dual, plain, self.last_block.modulate(condition), self.out_modulation(condition))

    def predict(
        self,
        latents: Float[Array, "b h w 16"],
        context: Float[Array, "b t context"],
        modulation: Modulation,
        first: Int[Array, ""] | int = 0,
    ) -> Float[Array, "b h w 16"]:
        """The velocity, given what `modulate` made of timestep and pooled text: of rows for several steps one after
        another, those from row `first` on."""
        streams, tokens = self.embed(latents, context), context.shape[1]

        def run(pass_on: Callable[[Streams], Streams], block: JointBlock, streams: Streams, vectors: Any) -> Streams:
            return pass_on(block(streams, from_row(first, vectors), tokens))

        for blocks, vectors in self.stacks(modulation):
            # What the loop over a stack carries is kept for a gradient, once for each block.
            pass_on = tuple if isinstance(blocks, nnx.List) else taken
            streams = scan_blocks(blocks, streams, partial(run, pass_on), vectors)
        image, *_ = self.last_block(streams, from_row(first, modulation.last_block), tokens)

        [(_, [normed])] = add_and_norm([image], [Norms(from_row(first, modulation.out), ((SHIFT, SCALE),))])
        return self.unpatchify(self.out(normed), *latents.shape[1:3])

    def image_streams(
        self, latents: Float[Array, "b h w 16"], context: Float[Array, "b t context"], modulation: Modulation
    ) -> list[Float[Array, "b t c"]]:
        """What the image stream is after each block, in the course of `predict`. Blocks must be stacks."""
        streams, tokens = self.embed(latents, context), context.shape[1]
        images: list[Array] = []

        def run(streams: Streams, layer: tuple[JointBlock, Any]) -> tuple[Streams, Array]:
            block, vectors = layer
            streams = taken(block(streams, from_row(0, vectors), tokens))
            return streams, streams[0].x

        for stack in self.stacks(modulation):
            streams, after = jax.lax.scan(run, streams, stack)
            images += list(after)
        return [*images, taken(self.last_block(streams, from_row(0, modulation.last_block), tokens))[0].x]

    def embed(self, latents: Float[Array, "b h w 16"], context: Float[Array, "b t context"]) -> Streams:
        """Both streams as they enter the first block. The context gets rows that nothing attends to, lest matrix
        products pad it one by one."""
        dtype = self.out.kernel.dtype
        image = self.patch_embed(self.patchify(latents.astype(dtype))) + self.positions(*latents.shape[1:3])
        context = jnp.pad(context.astype(dtype), ((0, 0), (0, -context.shape[1] % ROWS_ALIGNED), (0, 0)))
        return ResidualSum(image), ResidualSum(self.context_embed(context))

    def stacks(self, modulation: Modulation) -> list[tuple[Any, Any]]:
        """All blocks but the last, in order, with their vectors."""
        pairs = ((self.dual_blocks, modulation.dual_blocks), (self.blocks, modulation.blocks))
        return [(blocks, vectors) for blocks, vectors in pairs if blocks is not None]

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
