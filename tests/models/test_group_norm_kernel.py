"""Our group norm against its portable twin: interpreted, anywhere, and compiled, on a Hopper GPU; that it can be
lowered, anywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.models import group_norm, layers

ON_HOPPER = jax.default_backend() == "gpu" and layers._compute_capability() == 9
COMPILED = pytest.param(
    False, marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")], id="compiled"
)
INTERPRETED = pytest.param(True, id="interpreted")


@pytest.fixture(params=[INTERPRETED, COMPILED])
def interpret(request) -> bool:
    return request.param


def image(*shape: int, seed: int = 0, mean: float = 0.0) -> jax.Array:
    return jnp.asarray(mean + np.random.default_rng(seed).normal(size=shape), "bfloat16")


def operands(*shape: int, mean: float = 0.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    return image(*shape, mean=mean), 1 + image(shape[-1], seed=1) / 5, image(shape[-1], seed=2)


def assert_equal_but_for_one_rounding(made, expected):
    made, expected = np.asarray(made, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(made, expected, rtol=2**-7, atol=1e-4)
    assert (made != expected).mean() < 0.01


@pytest.mark.parametrize(
    "shape, groups, mean",
    [
        ((2, 13, 7, 64), 32, 0.0),
        ((1, 33, 17, 128), 32, 50.0),
        ((1, 5, 3, 512), 32, 0.0),
        ((1, 4, 4, 1024), 4, 0.0),
        ((2, 160, 64, 4), 2, -3.0),
        ((1, 130, 67, 512), 32, 3.0),
    ],
)
def test_images_are_normed_as_by_the_portable_twin(shape, groups, mean, interpret):
    arrays = operands(*shape, mean=mean)
    made = jax.jit(partial(group_norm.group_norm, groups, interpret=interpret))(*arrays)
    assert_equal_but_for_one_rounding(made, layers._portable_group_norm(groups, *arrays))


def test_no_digits_are_lost_where_the_first_pixels_are_unlike_the_others(interpret):
    x, scale, bias = operands(1, 40, 40, 64)
    x = x.at[:, 0, 0].set(1000.0)
    made = group_norm.group_norm(32, x, scale, bias, interpret=interpret)
    assert_equal_but_for_one_rounding(made, layers._portable_group_norm(32, x, scale, bias))


@pytest.mark.parametrize("shape", [(2, 13, 7, 64), (1, 128, 64, 128)])
def test_a_residual_sum_is_normed_and_activated_as_by_the_portable_twin(shape, interpret):
    (x, scale, bias), y = operands(*shape), image(*shape, seed=3)
    total, factors = group_norm.statistics(32, x, (y,), scale, bias, interpret=interpret)
    made = group_norm.normalised(total, factors, jax.nn.silu, interpret=interpret)
    np.testing.assert_array_equal(np.asarray(total), np.asarray(x + y))
    expected = jax.nn.silu(layers._portable_group_norm(32, total.astype(jnp.float32), scale, bias))
    assert_equal_but_for_one_rounding(made, expected.astype(jnp.bfloat16))


def test_the_gradient_is_that_of_the_portable_twin(interpret):
    portable = partial(layers._portable_group_norm, 32)
    kernel = partial(group_norm.group_norm, 32, interpret=interpret)
    normed = layers.differentiable(kernel, partial(layers._gradient, portable))

    def gradient(function, *arrays):
        return jax.grad(lambda *arrays: jnp.square(function(*arrays).astype(jnp.float32)).sum(), (0, 1, 2))(*arrays)

    arrays = operands(1, 9, 5, 64)
    for made, expected in zip(gradient(normed, *arrays), gradient(portable, *arrays)):
        np.testing.assert_allclose(np.asarray(made, np.float32), np.asarray(expected, np.float32), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("size, channels", [(128, 512), (256, 512), (512, 256), (1024, 128), (72, 256)])
def test_the_kernels_can_be_lowered_for_a_gpu_that_is_not_there(size, channels):
    x = jax.ShapeDtypeStruct((1, size, size, channels), "bfloat16")
    vector = jax.ShapeDtypeStruct((channels,), "bfloat16")
    norm = jax.jit(partial(group_norm.group_norm, 32))
    program = norm.trace(x, vector, vector).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.custom_call") == 2


@pytest.mark.parametrize(
    "channels, groups, dtype, suits",
    [
        (128, 32, "bfloat16", True),
        (128, 32, "float32", False),
        (96, 32, "bfloat16", False),
        (128, 3, "bfloat16", False),
        (2048, 32, "bfloat16", False),
    ],
)
def test_powers_of_two_in_bfloat16_are_for_the_kernels(channels, groups, dtype, suits):
    assert layers._suits_group_norm(jax.ShapeDtypeStruct((1, 8, 8, channels), dtype), groups) == suits
