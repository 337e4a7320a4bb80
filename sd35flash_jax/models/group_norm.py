"""Group norm for Hopper GPUs, written in Pallas and compiled by Triton: the twin of `layers.group_norm`, which chooses
between them; a test holds them equal.

Statistics take one reading of the image. A program serves a run of pixels and writes the mean of each channel and the
squares of what differs from it; a second, small kernel puts the programs' together into what a channel is multiplied by
and what is added to it. Sums are of differences to the run's first pixel, so that the squares lose no digits.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

_WARPS = 8
# Numbers of which a program's threads load 16 bytes each, and so many such loads on their way at a time.
_NUMBERS = _WARPS * 32 * 8
_LOADS = 8
# Of an image: four for each of the 132 multiprocessors of an H100.
_PROGRAMS = 528
# Whose statistics are put together at a time.
_JOINED = 256


def group_norm(
    groups: int,
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    interpret: bool = False,
) -> Float[Array, "b h w c"]:
    """Group norm of bfloat16 images whose number of channels is a power of two, as that of `groups` is. What is left of
    it after the statistics is for XLA, which takes it together with what follows."""
    _, factors = statistics(groups, x, (), scale, bias, interpret)
    multiplier, offset = factors[:, 0, None, None], factors[:, 1, None, None]
    return (x.astype(jnp.float32) * multiplier + offset).astype(x.dtype)


@partial(jax.jit, static_argnames=("groups", "interpret"))
def statistics(
    groups: int,
    x: Float[Array, "b h w c"],
    updates: tuple[Float[Array, "b h w c"], ...],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    interpret: bool = False,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b 2 c"]]:
    """The residual sum of `x` and the updates, and in float32 what each of its channels is multiplied by and what is
    then added to it in group norm, from one reading of each and one writing of the sum. Without updates the sum is `x`
    itself, and not written."""
    batch, height, width, channels = x.shape
    pixels = height * width
    rows, own = _rows(channels), _pixels_of_a_program(pixels, channels)
    programs = pl.cdiv(pixels, own)
    within = pixels if pixels % own else None

    def sums_of_runs(x_ref, *refs):
        update_refs, out_ref, total_ref = refs[: len(updates)], refs[len(updates)], refs[-1]
        image, program = pl.program_id(0), pl.program_id(1)
        first, columns = program * own, jnp.arange(channels)

        def read(place, mask=None):
            arrays = [plgpu.load(ref.at[image, *place], mask=mask) for ref in (x_ref, *update_refs)]
            total, *others = (array.astype(jnp.float32) for array in arrays)
            for other in others:
                total = total + other
            return total.astype(x.dtype)

        near = read((first, columns)).astype(jnp.float32)[None]

        def step(index, sums):
            places = [_place(first, index * _LOADS + load, rows, columns, within) for load in range(_LOADS)]
            tiles = [read(place, mask) for place, mask in places]
            total, squares = sums
            for tile, (place, mask) in zip(tiles, places):
                if updates:
                    plgpu.store(total_ref.at[image, *place], tile, mask=mask)
                difference = tile.astype(jnp.float32) - near
                if mask is not None:
                    difference = jnp.where(mask, difference, 0.0)
                total, squares = total + difference, squares + difference * difference
            return total, squares

        zeros = jnp.zeros((rows, channels), jnp.float32)
        sums = jax.lax.fori_loop(0, own // (_LOADS * rows), step, (zeros, zeros))
        total, squares = (jnp.sum(each, axis=0) for each in sums)
        mean = total / jnp.minimum(own, pixels - first).astype(jnp.float32)
        out_ref[image, program, 0] = near[0] + mean
        out_ref[image, program, 1] = squares - total * mean

    of_runs, *written = pl.pallas_call(
        sums_of_runs,
        grid=(batch, programs),
        out_shape=[
            jax.ShapeDtypeStruct((batch, programs, 2, channels), jnp.float32),
            *[jax.ShapeDtypeStruct((batch, pixels, channels), x.dtype)] * bool(updates),
        ],
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="group_norm_statistics",
    )(*(array.reshape(batch, pixels, channels) for array in (x, *updates)))
    factors = _factors(groups, of_runs, pixels, own, scale, bias, interpret)
    return (written[0].reshape(x.shape) if updates else x), factors


def _factors(
    groups: int,
    of_runs: Float[Array, "b p 2 c"],
    pixels: int,
    own: int,
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    interpret: bool,
) -> Float[Array, "b 2 c"]:
    """Multiplier and offset of each channel, from means and squares of runs of `own` pixels. The runs are put together
    by their means' differences to the first one's mean of the group."""
    batch, programs, _, channels = of_runs.shape
    width = channels // groups

    def join_runs(of_runs_ref, scale_ref, bias_ref, out_ref):
        image, columns = pl.program_id(0), pl.program_id(1) * width + jnp.arange(width)
        near = jnp.sum(of_runs_ref[image, 0, 0, columns]) / width

        def step(index, sums):
            runs = index * _JOINED + jnp.arange(_JOINED)
            mask = jnp.broadcast_to((runs < programs)[:, None], (_JOINED, width))
            means, squares = (
                plgpu.load(of_runs_ref.at[image, runs[:, None], kind, columns[None]], mask=mask, other=0.0)
                for kind in (0, 1)
            )
            counts = jnp.clip(pixels - runs * own, 0, own).astype(jnp.float32)[:, None]
            differences = means - near
            weighted = counts * differences
            return sums[0] + weighted, sums[1] + squares + weighted * differences

        zeros = jnp.zeros((_JOINED, width), jnp.float32)
        sums = jax.lax.fori_loop(0, pl.cdiv(programs, _JOINED), step, (zeros, zeros))
        offset, square = (jnp.sum(each) / (pixels * width) for each in sums)
        multiplier = jax.lax.rsqrt(square - offset * offset + 1e-6) * scale_ref[columns].astype(jnp.float32)
        out_ref[image, 0, columns] = multiplier
        out_ref[image, 1, columns] = bias_ref[columns].astype(jnp.float32) - (near + offset) * multiplier

    made: Array = pl.pallas_call(
        join_runs,
        grid=(batch, groups),
        out_shape=jax.ShapeDtypeStruct((batch, 2, channels), jnp.float32),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="group_norm_factors",
    )(of_runs, scale, bias)
    return made


@partial(jax.jit, static_argnames=("activation", "interpret"))
def normalised(
    x: Float[Array, "b h w c"],
    factors: Float[Array, "b 2 c"],
    activation: Callable[[Array], Array],
    interpret: bool = False,
) -> Float[Array, "b h w c"]:
    """The activation of each channel times its factor, plus its offset, in float32 and rounded once."""
    batch, height, width, channels = x.shape
    pixels = height * width
    rows, own = _rows(channels), _pixels_of_a_program(pixels, channels)
    steps = own // (_LOADS * rows)
    within = pixels if pixels % own else None

    def normalise(x_ref, factors_ref, out_ref):
        image, first, columns = pl.program_id(0), pl.program_id(1) * own, jnp.arange(channels)
        multiplier, offset = factors_ref[image, 0][None], factors_ref[image, 1][None]

        def step(index, _):
            # Backwards: what the statistics read last may still be in the cache.
            last = (steps - 1 - index) * _LOADS
            places = [_place(first, last + load, rows, columns, within) for load in range(_LOADS)]
            tiles = [plgpu.load(x_ref.at[image, *place], mask=mask) for place, mask in places]
            for tile, (place, mask) in zip(tiles, places):
                normed = activation(tile.astype(jnp.float32) * multiplier + offset)
                plgpu.store(out_ref.at[image, *place], normed.astype(x.dtype), mask=mask)

        jax.lax.fori_loop(0, steps, step, None)

    made: Array = pl.pallas_call(
        normalise,
        grid=(batch, pl.cdiv(pixels, own)),
        out_shape=jax.ShapeDtypeStruct((batch, pixels, channels), x.dtype),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=_WARPS),
        interpret=interpret,
        name="group_norm_normalised",
    )(x.reshape(batch, pixels, channels), factors)
    return made.reshape(x.shape)


def _rows(channels: int) -> int:
    """Pixels of so many channels that a program's threads load at a time."""
    return _NUMBERS // channels


def _pixels_of_a_program(pixels: int, channels: int) -> int:
    """As many steps' as leave enough programs to fill the card."""
    in_a_step = _LOADS * _rows(channels)
    return pl.cdiv(pl.cdiv(pixels, in_a_step), _PROGRAMS) * in_a_step


def _place(
    first: Array, tile: Array, rows: int, columns: Array, within: int | None
) -> tuple[tuple[Array, Array], Array | None]:
    """Indices of a tile of so many rows of pixels, and which of them are within the image's pixels, where not all are:
    loads without a mask overlap more."""
    own = first + tile * rows + jnp.arange(rows)
    mask = None if within is None else jnp.broadcast_to((own < within)[:, None], (rows, len(columns)))
    return (own[:, None], columns[None]), mask
