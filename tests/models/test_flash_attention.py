"""Our attention kernel against its portable twin, on a Hopper GPU; that it can be lowered, and how rows are shared
out, anywhere."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35flash_jax.models import layers
from sd35flash_jax.models.flash_attention import _blocks_of_rows, flash_attention
from sd35flash_jax.models.streams import Projected

ON_HOPPER = jax.default_backend() == "gpu" and layers._compute_capability() == 9


def projections(batch: int, rows: tuple[int, ...], heads: int) -> list[jax.Array]:
    draw = np.random.default_rng(sum(rows)).normal
    size = np.repeat([4.0, 1.0, 1.0], heads * 64)
    return [jnp.asarray(draw(size=(batch, count, 3 * heads * 64)) * size, "bfloat16") for count in rows]


def streams(arrays: Sequence[jax.Array], normed: bool) -> list[Projected]:
    draw = np.random.default_rng(1).uniform
    # Scales large enough for weights that differ, and for maxima that grow from one block of keys to the next.
    scales = [tuple(jnp.asarray(draw(*bounds, 64), "bfloat16") for bounds in ((3, 5), (0.5, 1.5))) for _ in arrays]
    return [Projected(array, own if normed else None) for array, own in zip(arrays, scales)]


def attending(attend: Callable[..., list[jax.Array]], heads: int, keys: int, normed: bool):
    return jax.jit(lambda *arrays: attend(streams(arrays, normed), heads, keys))


def ours(heads: int, keys: int, normed: bool = True):
    return attending(layers.joint_attention, heads, keys, normed)


def library(heads: int, keys: int, normed: bool = True):
    """The portable twin."""

    def attend(streams: list[Projected], heads: int, keys: int) -> list[jax.Array]:
        return layers._portable_joint_attention(heads, keys, streams)

    return attending(attend, heads, keys, normed)


def relative_error(found, wanted) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@given(st.integers(1, 20_000), st.integers(1, 1_000), st.integers(1, 200))
def test_every_row_has_a_warpgroup_and_no_thread_block_is_too_tall(tokens, heads, multiprocessors):
    tall, most, least, blocks = _blocks_of_rows(tokens, heads, multiprocessors)
    assert least >= 1 and (most if tall else least) <= 3 and 0 <= tall < blocks
    assert tall * most + (blocks - tall) * least == -(-tokens // 64)


@pytest.mark.parametrize("rows, keys", [((4096, 336), 4429), ((64,), 64), ((8,), 1)])
def test_the_kernel_can_be_lowered_for_a_gpu_that_is_not_there(rows, keys):
    key, scale = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((2, sum(rows), 3, 64), (64,)))
    own = [Projected(jax.ShapeDtypeStruct((2, count, 9 * 64), "bfloat16"), (scale, scale)) for count in rows]
    attend = jax.jit(partial(flash_attention, keys=keys, multiprocessors=132))
    assert "mosaic_gpu" in attend.trace(key, own).lower(lowering_platforms=("cuda",)).as_text()


def test_layers_that_are_alike_share_one_kernel_of_a_program():
    """Making one takes longer than compiling what is around it."""

    def three(key, projection):
        for _ in range(3):
            [mixed] = flash_attention(key, [Projected(projection, None)], 61, 132)
            key = mixed.reshape(key.shape)
        return key

    key, projected = (jax.ShapeDtypeStruct((1, 64, *rest), "bfloat16") for rest in ((2, 64), (6 * 64,)))
    program = jax.jit(three).trace(key, projected).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "batch, rows, keys, heads, normed",
    [
        (1, (4096, 336), 4429, 24, True),
        (2, (1024,), 1024, 6, False),
        (3, (200,), 193, 2, True),
        (1, (8,), 1, 1, True),
        (5, (64, 128, 72), 257, 38, True),
        (2, (192, 64, 8), 263, 4, False),
    ],
)
def test_the_kernel_agrees_with_its_portable_twin(batch, rows, keys, heads, normed):
    arrays = projections(batch, rows, heads)
    attend, twin = ours(heads, keys, normed), library(heads, keys, normed)
    assert "mosaic_gpu" in attend.lower(*arrays).as_text()
    with jax.default_matmul_precision("highest"):
        exact = twin(*(array.astype(jnp.float32) for array in arrays))
    for made, portable, wanted in zip(attend(*arrays), twin(*arrays), exact, strict=True):
        error = relative_error(portable, wanted)
        assert error < 1e-2 and relative_error(made, wanted) < 1.1 * error + 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_the_kernels_gradient_is_its_portable_twins():
    arrays = projections(2, (128, 136), 4)

    def gradients(attend):
        def loss(*arrays):
            return sum(jnp.sum(jnp.sin(mixed.astype(jnp.float32))) for mixed in attend(*arrays))

        return jax.jit(jax.grad(loss, (0, 1)))

    made = gradients(ours(4, 257))(*arrays)
    for found, wanted in zip(made, gradients(library(4, 257))(*arrays)):
        assert relative_error(found, wanted) < 1e-2
    assert not made[1][:, 129:, 4 * 64 :].any()
