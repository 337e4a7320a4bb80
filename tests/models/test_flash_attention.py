"""Our attention kernel against its portable twin, on a Hopper GPU; that it can be lowered, and how rows are shared
out, anywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35flash_jax.models import layers
from sd35flash_jax.models.flash_attention import _blocks_of_rows, flash_attention

ON_HOPPER = jax.default_backend() == "gpu" and layers._compute_capability() == 9


def operands(batch: int, queries: int, rows: int, heads: int) -> list[jax.Array]:
    draw = np.random.default_rng(queries).normal
    shapes = ((batch, queries, heads, 64), (batch, rows, heads, 64), (batch, rows, heads, 64))
    # Queries large enough for weights that differ, and for maxima that grow from one block of keys to the next.
    return [jnp.asarray(draw(size=shape) * size, "bfloat16") for shape, size in zip(shapes, (4, 1, 1))]


def ours(rows: tuple[int, ...], keys: int, scale: float):
    return jax.jit(partial(layers.joint_attention, rows=rows, keys=keys, scale=scale))


def library(rows: tuple[int, ...], keys: int, scale: float):
    """The portable twin."""

    def attend(query, key, value):
        mixed = layers._library_attention(query, key[:, :keys], value[:, :keys], scale)
        return jnp.split(mixed, np.cumsum(rows)[:-1], axis=1)

    return jax.jit(attend)


def relative_error(found, wanted) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@given(st.integers(1, 20_000), st.integers(1, 1_000), st.integers(1, 200))
def test_every_row_has_a_warpgroup_and_no_thread_block_is_too_tall(tokens, heads, multiprocessors):
    tall, most, least, blocks = _blocks_of_rows(tokens, heads, multiprocessors)
    assert least >= 1 and (most if tall else least) <= 3 and 0 <= tall < blocks
    assert tall * most + (blocks - tall) * least == -(-tokens // 64)


@pytest.mark.parametrize("tokens, keys", [(4432, 4429), (64, 64), (8, 1)])
def test_the_kernel_can_be_lowered_for_a_gpu_that_is_not_there(tokens, keys):
    shape = jax.ShapeDtypeStruct((2, tokens, 3, 64), "bfloat16")
    attend = jax.jit(partial(flash_attention, rows=(tokens,), keys=keys, scale=0.125, multiprocessors=132))
    assert "mosaic_gpu" in attend.trace(shape, shape, shape).lower(lowering_platforms=("cuda",)).as_text()


def test_layers_that_are_alike_share_one_kernel_of_a_program():
    """Making one takes longer than compiling what is around it."""

    def three(query, key, value):
        for _ in range(3):
            [mixed] = flash_attention(query, key, value, (64,), 61, 0.125, 132)
            query = mixed.reshape(query.shape)
        return query

    shape = jax.ShapeDtypeStruct((1, 64, 2, 64), "bfloat16")
    program = jax.jit(three).trace(shape, shape, shape).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "batch, rows, tokens, keys, heads",
    [
        (1, (4096, 336), 4432, 4429, 24),
        (2, (1024,), 1024, 1024, 6),
        (3, (72,), 200, 193, 2),
        (1, (8,), 128, 1, 1),
        (5, (64, 128, 8), 264, 257, 38),
    ],
)
def test_the_kernel_agrees_with_its_portable_twin(batch, rows, tokens, keys, heads):
    arrays = operands(batch, sum(rows), tokens, heads)
    attend, twin = ours(rows, keys, 0.2), library(rows, keys, 0.2)
    assert "mosaic_gpu" in attend.lower(*arrays).as_text()
    with jax.default_matmul_precision("highest"):
        exact = twin(*(array.astype(jnp.float32) for array in arrays))
    for made, portable, wanted in zip(attend(*arrays), twin(*arrays), exact, strict=True):
        assert relative_error(made, wanted) < 5e-3 and relative_error(portable, wanted) < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_the_kernels_gradient_is_its_portable_twins():
    arrays = operands(2, 136, 264, 4)

    def gradients(attend):
        return jax.jit(jax.grad(lambda *arrays: jnp.sum(jnp.sin(attend(*arrays)[0].astype(jnp.float32))), (0, 1, 2)))

    made = gradients(ours((136,), 257, 0.125))(*arrays)
    for found, wanted in zip(made, gradients(library((136,), 257, 0.125))(*arrays)):
        assert relative_error(found, wanted) < 1e-2
    assert not made[1][:, 257:].any() and not made[2][:, 257:].any()
