"""Attention with heads of 64 for Hopper GPUs, after FlashAttention-3 (arXiv 2407.08608), written in Pallas and compiled
by Mosaic GPU. `layers.attention` chooses between it and its portable twin; a test holds them equal.

A thread block has up to three warpgroups that each serve 64 queries of one head, and one more that fetches keys and
values for all of them. Exponentials take as long as the matrix products at this head size, so both have to run at once:
a warpgroup lets its products of the next keys start before the softmax of these, and the warpgroups take turns at
starting theirs.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu.utils import memref_ptr
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float

from sd35flash_jax.models.streams import QUERIES, VALUES, Projected

_ROWS = 64
_WARPGROUPS = 3
_KEYS = 128
_STAGES = 2
_THREADS = 128
# Registers of a thread, of 128 at the start: fetching needs few, and what it gives up the others take.
_FETCH_REGISTERS, _ATTEND_REGISTERS = 32, 160
# Barriers of the hardware, of 16; those below are Mosaic's, which takes 0 and one for each warpgroup. One for each
# warpgroup's turn, then one for each stage of keys and of values that may be overwritten.
_TURN = _WARPGROUPS + 2
_KEY_FREE = _TURN + _WARPGROUPS
_VALUE_FREE = _KEY_FREE + _STAGES
# Rows of 64 bfloat16 numbers in shared memory, as the hardware copies and multiplies them, and what says so to it.
_HEAD_SIZE = 64
_SWIZZLED = (plgpu.TilingTransform((8, _HEAD_SIZE)), plgpu.SwizzleTransform(2 * _HEAD_SIZE))
_SWIZZLED_OPERAND = 1 << 62 | 8 * 2 * _HEAD_SIZE >> 4 << 32 | 1 << 16


@partial(jax.jit, static_argnames=("keys", "multiprocessors"))
def flash_attention(
    key: Float[Array, "b t n d"], streams: Sequence[Projected], keys: int, multiprocessors: int
) -> list[Float[Array, "b r c"]]:
    """Softmax attention to the first `keys` rows of streams that follow one another, all of them bfloat16; softmax and
    sums are float32. Later rows may hold anything finite. Queries and values are read out of the streams' projections,
    where they are, and queries are RMS-normed on their way; the keys of all streams have been normed and joined. Heads
    are merged on return, an array for each stream.

    Heads have 64 features. Numbers of tokens are multiples of 8, the rows of a tile that the hardware copies, those of
    all streams but the last multiples of 64, which a warpgroup serves."""
    batch, tokens, heads, head_size = key.shape
    tall, most, least, blocks = _blocks_of_rows(tokens, batch * heads, multiprocessors)
    rows = [stream.qkv.shape[1] for stream in streams]
    scales = [stream.scales[0] for stream in streams if stream.scales is not None]
    starts = list(accumulate(rows, initial=0))
    steps = pl.cdiv(keys, _KEYS)
    in_first = keys - (steps - 1) * _KEYS
    to_powers_of_two = _HEAD_SIZE**-0.5 * math.log2(math.e)

    def kernel(key_ref, *refs):
        counts, given = (len(rows), len(scales), len(rows)), iter(refs)
        projected_refs, scale_refs, out_refs = (list(islice(given, count)) for count in counts)
        queries, fetched_keys, fetched_values, *arrivals = given
        queries_there, keys_there, values_there = arrivals
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        image, head = lax.div(lax.axis_index("head"), heads), lax.rem(lax.axis_index("head"), heads)
        warpgroups = jnp.where(block < tall, most, least)
        before = jnp.minimum(block, tall) * most + jnp.maximum(block - tall, 0) * least
        everyone = (warpgroups + 1) * _THREADS

        def in_its_stream(row, run):
            """Run something for the rows of a warpgroup, from a row of all streams on, with the stream that has them
            and their place there."""
            for stream, start in enumerate(starts[:-1]):
                is_before_next = row < starts[stream + 1] if stream + 1 < len(rows) else True
                pl.when((row >= start) & is_before_next)(partial(run, stream, pl.ds(row - start, _ROWS)))

        @pl.when(warpgroup == _WARPGROUPS)
        def fetch():
            plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")

            def fetch_values(target, there, stream, place):
                source = projected_refs[stream].at[image, place, VALUES * heads + head]
                plgpu.copy_gmem_to_smem(source, target, there)

            @pl.loop(0, steps)
            def step(index):
                # From the last keys on, which may be fewer: rows beyond the end of an array arrive as zeros.
                row, slot = (steps - 1 - index) * _KEYS, lax.rem(index, _STAGES)
                pl.when(index >= _STAGES)(partial(_barrier, "sync", _KEY_FREE + slot, everyone))
                source = key_ref.at[image, pl.ds(row, _KEYS), head]
                plgpu.copy_gmem_to_smem(source, fetched_keys.at[slot], keys_there.at[slot])
                pl.when(index >= _STAGES)(partial(_barrier, "sync", _VALUE_FREE + slot, everyone))
                for part in range(0, _KEYS, _ROWS):
                    target = fetched_values.at[slot, pl.ds(part, _ROWS)]
                    in_its_stream(row + part, partial(fetch_values, target, values_there.at[slot]))

        @pl.when(warpgroup < warpgroups)
        def attend():
            plgpu.set_max_registers(_ATTEND_REGISTERS, action="increase")
            row = (before + warpgroup) * _ROWS
            own_queries = queries.at[warpgroup]

            def fetch_queries(stream, place):
                source = projected_refs[stream].at[image, place, QUERIES * heads + head]
                plgpu.copy_gmem_to_smem(source, own_queries, queries_there.at[warpgroup])

            def norm_queries(stream, _):
                raw = plgpu.load(own_queries, (), layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                inverse = lax.rsqrt((raw * raw).sum(axis=1) / head_size + 1e-6)
                scale = plgpu.load(scale_refs[stream], (), layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                by_column = lax.broadcast_in_dim(scale.astype(jnp.float32), raw.shape, [1])
                queries[warpgroup] = (raw * (_by_row(inverse, raw) * by_column)).astype(key.dtype)
                plgpu.commit_smem()

            in_its_stream(row, fetch_queries)
            following = jnp.where(warpgroup + 1 == warpgroups, 0, warpgroup + 1)

            def begin_turn():
                _barrier("sync", _TURN + warpgroup, 2 * _THREADS)

            def end_turn():
                _barrier("arrive", _TURN + following, 2 * _THREADS)

            def release(free, index):
                is_awaited = index + _STAGES < steps
                pl.when(is_awaited)(partial(_barrier, "arrive", free + lax.rem(index, _STAGES), everyone))

            def begin_logits(slot):
                plgpu.barrier_wait(keys_there.at[slot])
                begin_turn()
                return _begin_products(queries.at[warpgroup], fetched_keys.at[slot])

            def softmax(logits, highest):
                """New maxima of the rows, what older sums shrink by, and weights that are not normed yet."""
                new = jnp.maximum(highest, logits.max(axis=1) * to_powers_of_two)
                return new, jnp.exp2(highest - new), jnp.exp2(logits * to_powers_of_two - _by_row(new, logits))

            def mix(out):
                def step(index, carry):
                    highest, sums, weights = carry
                    slot, last_slot = lax.rem(index, _STAGES), lax.rem(index - 1, _STAGES)
                    logits = begin_logits(slot)
                    plgpu.barrier_wait(values_there.at[last_slot])
                    plgpu.wgmma(out, weights, fetched_values.at[last_slot])
                    end_turn()
                    logits = _finished(logits, but_for=1)
                    release(_KEY_FREE, index)
                    highest, shrink, weights = softmax(logits, highest)
                    sums = sums * _by_row(shrink, sums) + _folded(weights)
                    so_far = plgpu.wgmma_accumulator_load(out, wait_n=0)
                    release(_VALUE_FREE, index - 1)
                    out[...] = so_far * _by_row(shrink, so_far)
                    return highest, sums, weights.astype(key.dtype)

                plgpu.barrier_wait(queries_there.at[warpgroup])
                if scales:
                    in_its_stream(row, norm_queries)
                logits = begin_logits(0)
                end_turn()
                logits = _finished(logits, but_for=0)
                release(_KEY_FREE, 0)
                if in_first < _KEYS:
                    columns = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
                    logits = jnp.where(columns < in_first, logits, -jnp.inf)
                lowest = plgpu.layout_cast(jnp.full(_ROWS, -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
                highest, _, weights = softmax(logits, lowest)
                carry = highest, _folded(weights), weights.astype(key.dtype)
                _, sums, weights = lax.fori_loop(1, steps, step, carry)
                last_slot = (steps - 1) % _STAGES
                plgpu.barrier_wait(values_there.at[last_slot])
                plgpu.wgmma(out, weights, fetched_values.at[last_slot])
                total = plgpu.wgmma_accumulator_load(out, wait_n=0)
                return total * _by_row(1 / sums.sum(axis=1), total)

            def write(stream, place):
                plgpu.copy_smem_to_gmem(queries.at[warpgroup], out_refs[stream].at[image, place, head])

            pl.when(warpgroup == warpgroups - 1)(end_turn)  # The first turn is the first warpgroup's.
            mixed = pl.run_scoped(mix, plgpu.ACC((_ROWS, head_size), jnp.float32))
            pl.when(warpgroup == 0)(begin_turn)  # The last turn, which nobody takes.
            queries[warpgroup] = mixed.astype(key.dtype)
            plgpu.commit_smem()
            in_its_stream(row, write)
            plgpu.wait_smem_to_gmem(0)

    def shared(*shape: int) -> Any:
        return plgpu.SMEM((*shape, _HEAD_SIZE), key.dtype, transforms=_SWIZZLED)

    run: Callable[..., list[Array]] = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((batch, count, heads, head_size), key.dtype) for count in rows],
        scratch_types=[
            shared(_WARPGROUPS, _ROWS),
            shared(_STAGES, _KEYS),
            shared(_STAGES, _KEYS),
            plgpu.Barrier(num_barriers=_WARPGROUPS),
            plgpu.Barrier(num_barriers=_STAGES),
            plgpu.Barrier(num_barriers=_STAGES, num_arrivals=_KEYS // _ROWS),
        ],
        grid=(blocks, batch * heads),
        grid_names=("block", "head"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention",
        # The barriers are all here already.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    in_heads = [stream.qkv.reshape(batch, -1, 3 * heads, head_size) for stream in streams]
    return [mixed.reshape(batch, -1, heads * head_size) for mixed in run(key, *in_heads, *scales)]


def _blocks_of_rows(tokens: int, heads: int, multiprocessors: int) -> tuple[int, int, int, int]:
    """How a head's rows are shared out: so many thread blocks of so many warpgroups, then ones of so many, and how many
    in all. They are as many as find room in the waves of thread blocks that are needed anyway: a wave that is not full
    would take as long as one of full blocks."""
    tiles, waves = pl.cdiv(tokens, _ROWS), 1
    while waves * multiprocessors // heads * _WARPGROUPS < tiles:
        waves += 1
    blocks = min(waves * multiprocessors // heads, tiles)
    least, tall = divmod(tiles, blocks)
    return tall, least + 1, least, blocks


def _by_row(values: Float[Array, " t"], like: Float[Array, "t c"]) -> Float[Array, "t c"]:
    return lax.broadcast_in_dim(values, like.shape, [0])


def _folded(weights: Float[Array, "t s"]) -> Float[Array, "t 8"]:
    """Sums of every eighth column, which a thread has on its own: they are summed up once, at the end."""
    parts = [weights[:, start : start + 8] for start in range(0, weights.shape[1], 8)]
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2])]
    return parts[0]


_PRODUCTS = plgpu.ShapeDtypeStruct((_ROWS, _KEYS), jnp.float32, layout=plgpu.Layout.WGMMA)


def _begin_products(queries: Any, keys: Any) -> Float[Array, "64 128"]:
    """Products of queries and keys, that may not be touched before they are `_finished`. The first of their parts
    overwrites what is there: `plgpu.wgmma` would add to zeros, which it sets while the other warpgroups wait."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_SWIZZLED),) * 2, return_type=_PRODUCTS)
    def begin(_, queries, keys):
        count = _KEYS // 2
        sums = "{" + ",".join(f"${index}" for index in range(count)) + "}"
        multiply = f"wgmma.mma_async.sync.aligned.m{_ROWS}n{_KEYS}k16.f32.bf16.bf16 {sums}"
        lines = [".reg .pred no, yes;", ".reg .b64 a, b;", "setp.ne.b32 no, 0, 0;", "setp.eq.b32 yes, 0, 0;"]
        lines += ["wgmma.fence.sync.aligned;", f"{multiply}, ${count}, ${count + 1}, no, 1, 1, 0, 0;"]
        for part in range(1, _HEAD_SIZE // 16):
            lines += [f"add.s64 a, ${count}, {2 * part};", f"add.s64 b, ${count + 1}, {2 * part};"]
            lines += [f"{multiply}, a, b, yes, 1, 1, 0, 0;"]
        lines += ["wgmma.commit_group.sync.aligned;"]
        operands = [_operand(queries), _operand(keys)]
        return _of_threads(operands, "{ " + " ".join(lines) + " }", ["l", "l"])

    return begin(queries, keys)


def _finished(products: Float[Array, "64 128"], but_for: int) -> Float[Array, "64 128"]:
    """The products, once all but so many groups of those that were begun later are finished."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=_PRODUCTS)
    def wait(_, products):
        index = [_constant(place) for place in range(2)]
        values = [llvm.extractelement(pair, index[place]) for pair in products.registers.flat for place in range(2)]
        same = [str(place) for place in range(len(values))]
        return _of_threads(values, f"wgmma.wait_group.sync.aligned {but_for};", same)

    return wait(products)


def _operand(rows: Any) -> Any:
    """How the hardware is told of rows in shared memory (PTX ISA, matrix descriptor)."""
    address = llvm.ptrtoint(ir.IntegerType.get_signless(64), memref_ptr(rows))
    return llvm.or_(llvm.and_(llvm.lshr(address, _constant(4)), _constant(0x3FFF)), _constant(_SWIZZLED_OPERAND))


def _of_threads(operands: list[Any], text: str, constraints: list[str]) -> FragmentedArray:
    """What an instruction gives each thread of `_PRODUCTS`, in pairs of columns."""
    number, layout = ir.F32Type.get(), plgpu.Layout.WGMMA.to_mgpu()
    pairs = np.empty(layout.registers_shape(_PRODUCTS.shape), object)
    results = llvm.StructType.get_literal([number] * (2 * pairs.size))
    constraints = ["=f"] * (2 * pairs.size) + constraints
    given: Any = llvm.inline_asm(results, operands, text, ",".join(constraints), has_side_effects=True)
    for start, place in enumerate(np.ndindex(pairs.shape)):
        pair = llvm.mlir_undef(ir.VectorType.get((2,), number))
        for half in range(2):
            value = llvm.extractvalue(number, given, [2 * start + half])
            pair = llvm.insertelement(pair, value, _constant(half))
        pairs[place] = pair
    return FragmentedArray(_registers=pairs, _layout=layout, _is_signed=None)


def _constant(value: int) -> Any:
    kind = ir.IntegerType.get_signless(64)
    return llvm.ConstantOp(kind, ir.IntegerAttr.get(kind, value)).result


def _barrier(operation: str, name: Array, threads: Array | int) -> None:
    """`arrive` at a barrier of the hardware, or `sync`, which waits there, for so many threads in all."""
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(splat, splat))
    def instruction(_, name, threads):
        registers = [name.registers[()], threads.registers[()]]
        text = f"bar.{operation} $0, $1;"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), registers, text, "r,r", has_side_effects=True)

    instruction(name, jnp.int32(threads))
