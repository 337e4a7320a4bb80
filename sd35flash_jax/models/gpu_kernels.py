"""Kernels of our own for NVIDIA GPUs, written in Pallas and compiled by Triton. Each has its portable twin in
`layers.py`, which chooses between them; a test holds them equal.

A kernel serves all streams of a block at once: at 512 px most take so little time that what passes between two kernels
counts.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, islice, repeat
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from sd35flash_jax.models.streams import Norms, Projected, ResidualSum

_ROWS = 16
_NORM_ROWS = 4


@partial(jax.jit, static_argnames=("heads", "thirds", "interpret"))
def join_heads(
    heads: int, streams: Sequence[Projected], thirds: tuple[int, ...], interpret: bool = False
) -> tuple[Float[Array, "b t n d"], ...]:
    """Those `thirds` of the projections that are named, out of queries, keys and values, of all streams, in one reading
    and one writing of each: see `layers.joined_heads`."""
    batch, _, width = streams[0].qkv.shape
    tokens = [stream.qkv.shape[1] for stream in streams]
    rows = sum(tokens)
    blocks = [pl.cdiv(own_tokens, _ROWS) for own_tokens in tokens]
    size = width // 3
    head_size = size // heads
    heads_at_once = next(count for count in (4, 2, 1) if heads % count == 0)
    part = heads_at_once * head_size
    arrays, structure = jax.tree.flatten(streams)

    def kernel(*refs):
        image, group = pl.program_id(0), pl.program_id(2)
        columns = group * part + jnp.arange(part)

        def write_rows(stream: Any, own_tokens: int, at: int, block: Array) -> None:
            own_rows = block * _ROWS + jnp.arange(_ROWS)
            mask = jnp.broadcast_to((own_rows < own_tokens)[:, None], (_ROWS, part))
            scale_refs = (*(stream.scales or (None, None)), None)
            for third, out_ref in zip(thirds, refs[-len(thirds) :]):
                place = stream.qkv.at[image, own_rows[:, None], third * size + columns[None, :]]
                x = plgpu.load(place, mask=mask, other=0.0)
                if scale_refs[third] is not None:
                    wide = x.astype(jnp.float32).reshape(_ROWS * heads_at_once, head_size)
                    mean_square = jnp.sum(wide * wide, axis=-1, keepdims=True) / head_size
                    scale = scale_refs[third][...].astype(jnp.float32)[None, :]
                    x = (wide * (jax.lax.rsqrt(mean_square + 1e-6) * scale)).astype(x.dtype).reshape(_ROWS, part)
                plgpu.store(out_ref.at[image, at + own_rows[:, None], columns[None, :]], x, mask=mask)

        given = jax.tree.unflatten(structure, refs[: len(arrays)])
        starts = accumulate(tokens, initial=0)
        _each_in_its_blocks(blocks, (partial(write_rows, *each) for each in zip(given, tokens, starts)))

    written = pl.pallas_call(
        kernel,
        grid=(batch, sum(blocks), heads // heads_at_once),
        out_shape=[jax.ShapeDtypeStruct((batch, rows, size), streams[0].qkv.dtype)] * len(thirds),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="join_heads",
    )(*arrays)
    return tuple(array.reshape(batch, rows, heads, head_size) for array in written)


@partial(jax.jit, static_argnames="interpret")
def add_and_norm(
    sums: Sequence[ResidualSum], norms: Sequence[Norms], interpret: bool = False
) -> list[tuple[Float[Array, "b t c"], list[Float[Array, "b t c"]]]]:
    """Residual sums and their adaptive layer norms, in one reading of each operand and one writing of each result: see
    `layers.add_and_norm`. A sum without updates is its `x` itself, and not written."""
    batch, _, size = sums[0].x.shape
    width = pl.next_power_of_2(size)
    tokens = [each.x.shape[1] for each in sums]
    blocks = [pl.cdiv(count, _NORM_ROWS) for count in tokens]
    results = [bool(each.updates) + len(own.places) for each, own in zip(sums, norms)]
    arrays, structure = jax.tree.flatten((sums, norms))
    arrays = [array.reshape(array.shape or 1) for array in arrays]

    def kernel(*refs):
        image, columns = pl.program_id(0), jnp.arange(width)
        inside = columns < size

        def vector(vectors: Any, index: int) -> Array:
            place = vectors.rows.at[vectors.first[0] + image, index * size + columns]
            return plgpu.load(place, mask=inside, other=0.0).astype(jnp.float32)[None, :]

        def write_rows(terms: ResidualSum, own: Norms, count: int, out_refs: list[Any], block: Array) -> None:
            rows = block * _NORM_ROWS + jnp.arange(_NORM_ROWS)
            mask = (rows < count)[:, None] & inside[None, :]

            def read(ref: Any) -> Array:
                place = ref.at[image, rows[:, None], columns[None, :]]
                return plgpu.load(place, mask=mask, other=0.0).astype(jnp.float32)

            def write(ref: Any, values: Array) -> None:
                plgpu.store(ref.at[image, rows[:, None], columns[None, :]], values.astype(ref.dtype), mask=mask)

            total = read(terms.x)
            for gate, update_ref in zip(terms.gates, terms.updates):
                total = total + vector(terms.vectors, gate) * read(update_ref)
            if terms.updates:
                total = total.astype(terms.x.dtype).astype(jnp.float32)
                write(out_refs[0], total)
            if own.places:
                centred = jnp.where(mask, total - jnp.sum(total, axis=1, keepdims=True) / size, 0.0)
                variance = jnp.sum(centred * centred, axis=1, keepdims=True) / size
                normed = centred * jax.lax.rsqrt(variance + 1e-6)
                for (shift, scale), out_ref in zip(own.places, out_refs[bool(terms.updates) :]):
                    write(out_ref, normed * (1 + vector(own.vectors, scale)) + vector(own.vectors, shift))

        given = jax.tree.unflatten(structure, refs[: len(arrays)])
        out_refs = _shared_out(refs[len(arrays) :], results)
        _each_in_its_blocks(blocks, (partial(write_rows, *each) for each in zip(*given, tokens, out_refs)))

    like = (repeat(jax.ShapeDtypeStruct(each.x.shape, each.x.dtype), count) for each, count in zip(sums, results))
    written = pl.pallas_call(
        kernel,
        grid=(batch, sum(blocks)),
        out_shape=list(chain.from_iterable(like)),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=8),
        interpret=interpret,
        name="add_and_norm",
    )(*arrays)
    by_stream = zip(sums, _shared_out(written, results))
    return [(own[0], own[1:]) if each.updates else (each.x, own) for each, own in by_stream]


def _each_in_its_blocks(blocks: Sequence[int], streams: Iterator[Callable[[Array], None]]) -> None:
    """Streams share the second axis of a kernel's grid, one after another: so many blocks each. A stream is called with
    the block's place among its own."""
    for write_rows, count, start in zip(streams, blocks, accumulate(blocks, initial=0)):
        block = pl.program_id(1) - start
        pl.when((block >= 0) & (block < count))(partial(write_rows, block))


def _shared_out(each: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    rest = iter(each)
    return [list(islice(rest, count)) for count in counts]
