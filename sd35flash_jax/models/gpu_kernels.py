"""Kernels of our own for NVIDIA GPUs, written in Pallas and compiled by Triton. Each has its portable twin in
`layers.py`, which chooses between them; a test holds them equal."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

_ROWS = 16
_NORM_ROWS = 4


@partial(jax.jit, static_argnames=("heads", "interpret"))
def join_heads(
    heads: int,
    streams: Sequence[tuple[Float[Array, "b t c3"], tuple[Float[Array, " d"], Float[Array, " d"]] | None]],
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Queries, keys and values of all streams, in one reading and one writing of each: see `layers.joined_heads`."""
    rows = [qkv.shape[1] for qkv, _ in streams]
    written: list[Array] = []
    for (qkv, scales), stop in zip(streams, accumulate(rows)):
        written = _write_heads(heads, qkv, scales, written, stop - qkv.shape[1], sum(rows), interpret)
    query, key, value = (array.reshape(*array.shape[:2], heads, -1) for array in written)
    return query, key, value


def _write_heads(
    heads: int,
    qkv: Float[Array, "b t c3"],
    scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None,
    into: Sequence[Float[Array, "b q c"]],
    at: int,
    rows: int,
    interpret: bool,
) -> list[Float[Array, "b q c"]]:
    """Cut a fused projection into heads, RMS-norm its queries and keys if they have scales, and write it from row `at`
    on: into queries, keys and values that are there, in place, or else into new ones of so many rows."""
    batch, tokens, width = qkv.shape
    head_size = width // 3 // heads
    heads_at_once = next(count for count in (4, 2, 1) if heads % count == 0)
    part = heads_at_once * head_size

    def kernel(qkv_ref, *refs):
        image, group = pl.program_id(0), pl.program_id(2)
        own_rows = pl.program_id(1) * _ROWS + jnp.arange(_ROWS)
        columns = group * part + jnp.arange(part)
        scale_refs = (*refs[: len(own)], None) if own else (None, None, None)
        mask = jnp.broadcast_to((own_rows < tokens)[:, None], (_ROWS, part))
        for third, (scale_ref, out_ref) in enumerate(zip(scale_refs, refs[-3:])):
            place = qkv_ref.at[image, own_rows[:, None], third * (width // 3) + columns[None, :]]
            x = plgpu.load(place, mask=mask, other=0.0)
            if scale_ref is not None:
                wide = x.astype(jnp.float32).reshape(_ROWS * heads_at_once, head_size)
                mean_square = jnp.sum(wide * wide, axis=-1, keepdims=True) / head_size
                scale = scale_ref[...].astype(jnp.float32)[None, :]
                x = (wide * (jax.lax.rsqrt(mean_square + 1e-6) * scale)).astype(x.dtype).reshape(_ROWS, part)
            plgpu.store(out_ref.at[image, at + own_rows[:, None], columns[None, :]], x, mask=mask)

    own = scales or ()
    written: list[Array] = pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(tokens, _ROWS), heads // heads_at_once),
        out_shape=[jax.ShapeDtypeStruct((batch, rows, width // 3), qkv.dtype)] * 3,
        input_output_aliases={1 + len(own) + index: index for index in range(len(into))},
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="write_heads",
    )(qkv, *own, *into)
    return written


@partial(jax.jit, static_argnames=("gates", "norms", "interpret"))
def add_and_norm(
    gates: tuple[int, ...],
    norms: tuple[tuple[int, int], ...],
    x: Float[Array, "b t c"],
    updates: Sequence[Float[Array, "b t c"]],
    vectors: Float[Array, "b v"],
    interpret: bool = False,
) -> tuple[Float[Array, "b t c"], list[Float[Array, "b t c"]]]:
    """`x` plus each update times its gate, and that sum's adaptive layer norms, in one reading of each and one writing
    of each: see `layers.add_and_norm`. Without updates the sum is `x` itself, and not written."""
    batch, tokens, size = x.shape
    width = pl.next_power_of_2(size)

    def kernel(x_ref, vectors_ref, *refs):
        update_refs, out_refs = refs[: len(updates)], refs[len(updates) :]
        image = pl.program_id(0)
        rows, columns = pl.program_id(1) * _NORM_ROWS + jnp.arange(_NORM_ROWS), jnp.arange(width)
        inside = columns < size
        mask = (rows < tokens)[:, None] & inside[None, :]

        def read(ref):
            return plgpu.load(ref.at[image, rows[:, None], columns[None, :]], mask=mask, other=0.0).astype(jnp.float32)

        def write(ref, values):
            plgpu.store(ref.at[image, rows[:, None], columns[None, :]], values.astype(ref.dtype), mask=mask)

        def vector(index):
            place = vectors_ref.at[image, index * size + columns]
            return plgpu.load(place, mask=inside, other=0.0).astype(jnp.float32)[None, :]

        total = read(x_ref)
        for gate, update_ref in zip(gates, update_refs):
            total = total + vector(gate) * read(update_ref)
        if updates:
            total = total.astype(x.dtype).astype(jnp.float32)
            write(out_refs[0], total)
        centred = jnp.where(mask, total - jnp.sum(total, axis=1, keepdims=True) / size, 0.0)
        variance = jnp.sum(centred * centred, axis=1, keepdims=True) / size
        normed = centred * jax.lax.rsqrt(variance + 1e-6)
        for (shift, scale), out_ref in zip(norms, out_refs[bool(updates) :]):
            write(out_ref, normed * (1 + vector(scale)) + vector(shift))

    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    written = pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(tokens, _NORM_ROWS)),
        out_shape=[like_x] * (bool(updates) + len(norms)),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=8),
        interpret=interpret,
        name="add_and_norm",
    )(x, vectors, *updates)
    return (written[0], list(written[1:])) if updates else (x, list(written))
