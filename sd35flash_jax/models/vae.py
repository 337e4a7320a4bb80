"""The 16-channel autoencoder of Stable Diffusion 3 (arXiv 2403.03206, section 2.1): convolutional, 8x downsampling,
one attention in the middle. Everything is NHWC."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sd35flash_jax.config import VAEConfig
from sd35flash_jax.models.layers import Model, attention, conv, linear, split_heads


def conv3x3(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Conv:
    return conv(inputs, outputs, (3, 3), padding=1, rngs=rngs)


class GroupNorm(nnx.Module):
    """Group norm (arXiv 1803.08494) in float32, rounded once, whose statistics take one reading of the image: sums over
    the pixels for each channel, of the difference to the mean of the first row of pixels and of its square. Taken from
    a value near the mean, the variance loses no digits; `nnx.GroupNorm` reads twice, or takes it from zero."""

    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.groups = config.norm_groups
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        wide = x.astype(jnp.float32)
        near = self.by_group(wide[:, :1].mean(axis=(1, 2), keepdims=True))
        difference = wide - near
        offset = self.by_group(difference.mean(axis=(1, 2), keepdims=True))
        variance = self.by_group(jnp.square(difference).mean(axis=(1, 2), keepdims=True)) - jnp.square(offset)
        multiplier = jax.lax.rsqrt(variance + 1e-6) * self.scale[...].astype(jnp.float32)
        return ((difference - offset) * multiplier + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def by_group(self, means: Float[Array, "b 1 1 c"]) -> Float[Array, "b 1 1 c"]:
        """Each channel's mean replaced by that of its group."""
        channels = means.shape[-1]
        grouped = means.reshape(-1, 1, 1, self.groups, channels // self.groups).mean(axis=-1)
        return grouped.repeat(channels // self.groups, axis=-1)


class ResidualBlock(nnx.Module):
    def __init__(self, inputs: int, outputs: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.norm_1 = GroupNorm(inputs, config, rngs=rngs)
        self.conv_1 = conv3x3(inputs, outputs, rngs)
        self.norm_2 = GroupNorm(outputs, config, rngs=rngs)
        self.conv_2 = conv3x3(outputs, outputs, rngs)
        self.shortcut = conv(inputs, outputs, (1, 1), rngs=rngs) if inputs != outputs else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = self.conv_1(jax.nn.silu(self.norm_1(x)))
        y = self.conv_2(jax.nn.silu(self.norm_2(y)))
        return (x if self.shortcut is None else self.shortcut(x)) + y


class SpatialAttention(nnx.Module):
    """One-head attention over all pixels."""

    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, config, rngs=rngs)
        self.qkv = linear(channels, 3 * channels, rngs=rngs)
        self.out = linear(channels, channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        tokens = self.norm(x).reshape(batch, height * width, channels)
        mixed = self.out(attention(*split_heads(self.qkv(tokens), heads=1)))
        return x + mixed.reshape(x.shape)


class Middle(nnx.Module):
    def __init__(self, channels: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.block_1 = ResidualBlock(channels, channels, config, rngs=rngs)
        self.attention = SpatialAttention(channels, config, rngs=rngs)
        self.block_2 = ResidualBlock(channels, channels, config, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.block_2(self.attention(self.block_1(x)))


class Downsample(nnx.Module):
    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        # The reference pads below and to the right alone.
        self.conv = conv(channels, channels, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a convolution, taken together: in the doubled image each 3x3 window sees a 2x2
    window of the small one, so four convolutions of 2x2, one for each parity of row and column, do 4/9 of the work."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv3x3(channels, channels, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape
        assert self.conv.bias is not None
        kernel, bias = self.conv.kernel[...].astype(jnp.float32), self.conv.bias[...]

        def parity(row: int, column: int) -> Float[Array, "b h w c"]:
            taps = merged_taps(merged_taps(kernel, 0, row), 1, column).astype(x.dtype)
            # Padded alike on all sides, and cut again: XLA pads unlike sides in a pass of their own.
            sums = jax.lax.conv_general_dilated(
                x, taps, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return (sums + bias)[:, row : row + height, column : column + width]

        parities = [parity(row, column) for row in (0, 1) for column in (0, 1)]
        together = jnp.stack(parities).reshape(2, 2, batch, height, width, channels).transpose(2, 3, 0, 4, 1, 5)
        return together.reshape(batch, 2 * height, 2 * width, channels)


def merged_taps(kernel: Float[Array, "..."], axis: int, parity: int) -> Float[Array, "..."]:
    """The two taps that three taps become on every second place of a doubled axis, of which two fall on one source."""
    first, second, third = jnp.split(kernel, 3, axis)
    taps = [first + second, third] if parity else [first, second + third]
    return jnp.concatenate(taps, axis)


class Level(nnx.Module):
    """Residual blocks at one resolution, then the resampling to the next level where there is one."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        resample: type[Downsample] | type[Upsample] | None,
        config: VAEConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            [ResidualBlock(outputs if i else inputs, outputs, config, rngs=rngs) for i in range(blocks)]
        )
        self.resample = resample(outputs, rngs=rngs) if resample else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class Encoder(nnx.Module):
    """pixels in [-1, 1] -> mean and log variance of the raw latents, `(b, h/8, w/8, 2 * latent_channels)`."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = config.channels
        self.conv_in = conv3x3(3, widths[0], rngs)
        self.levels = nnx.List(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.blocks_per_level,
                    Downsample if i < len(widths) - 1 else None,
                    config,
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.middle = Middle(widths[-1], config, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], config, rngs=rngs)
        self.conv_out = conv3x3(widths[-1], 2 * config.latent_channels, rngs)

    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h w c"]:
        x = self.conv_in(pixels)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """raw latents -> pixels in [-1, 1], not clipped."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = config.channels[::-1]
        self.conv_in = conv3x3(config.latent_channels, widths[0], rngs)
        self.middle = Middle(widths[0], config, rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.blocks_per_level + 1,
                    Upsample if i < len(widths) - 1 else None,
                    config,
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.norm_out = GroupNorm(widths[-1], config, rngs=rngs)
        self.conv_out = conv3x3(widths[-1], 3, rngs)

    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
        x = self.middle(self.conv_in(latents))
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class VAE(Model):
    """pixels in [0, 1] <-> model-scale latents."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h/8 w/8 c"]:
        """Posterior mean of pixels in [0, 1], as float32 model-scale latents."""
        dtype = self.encoder.conv_in.kernel.dtype
        moments = self.encoder((2.0 * pixels - 1.0).astype(dtype)).astype(jnp.float32)
        mean = moments[..., : self.config.latent_channels]
        return (mean - self.config.shift) * self.config.scale

    def decode(self, latents: Float[Array, "b h/8 w/8 c"]) -> Float[Array, "b h w 3"]:
        """Float32 pixels, clipped to [0, 1], of model-scale latents."""
        dtype = self.decoder.conv_in.kernel.dtype
        raw = latents / self.config.scale + self.config.shift
        pixels = self.decoder(raw.astype(dtype)).astype(jnp.float32)
        return jnp.clip(0.5 * pixels + 0.5, 0.0, 1.0)
