"""Each kernel against its portable twin: interpreted, anywhere, and compiled, on a Hopper GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.models import gpu_kernels, layers

ON_HOPPER = jax.default_backend() == "gpu" and layers._compute_capability() == 9
COMPILED = pytest.param(
    False, marks=[pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")], id="compiled"
)
INTERPRETED = pytest.param(True, id="interpreted")


@pytest.fixture(params=[INTERPRETED, COMPILED], autouse=True)
def kernels(request, monkeypatch):
    for name in ("join_heads", "add_and_norm"):
        kernel = getattr(gpu_kernels, name)
        monkeypatch.setattr(gpu_kernels, name, partial(kernel, interpret=request.param))


def joined(heads: int):
    """The kernel with its gradient, and its twin."""
    portable = partial(layers._portable_joined_heads, heads)
    return layers.differentiable(partial(gpu_kernels.join_heads, heads), partial(layers._gradient, portable)), portable


def added(gates: tuple[int, ...], norms: tuple[tuple[int, int], ...]):
    portable = partial(layers._portable_add_and_norm, gates, norms)
    return layers.differentiable(
        partial(gpu_kernels.add_and_norm, gates, norms), partial(layers._gradient, portable)
    ), portable


def values(seed: int, *shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_equal_but_for_one_rounding(made, expected):
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=1e-6)
        assert (one != other).mean() < 0.01


def streams(rows: list[int], heads: int, normed: bool, batch: int = 2, head_size: int = 64):
    return tuple(
        (
            values(index, batch, count, 3 * heads * head_size),
            (1 + values(index + 10, head_size) / 5, 1 + values(index + 20, head_size) / 5) if normed else None,
        )
        for index, count in enumerate(rows)
    )


@pytest.mark.parametrize(
    "image, context, heads, normed", [(37, 21, 6, True), (64, 16, 4, False), (5, 9, 3, True), (1, 1, 2, True)]
)
def test_heads_are_joined_as_by_the_portable_twin(image, context, heads, normed):
    arrays = streams([image, context], heads, normed)
    kernel, portable = joined(heads)
    assert_equal_but_for_one_rounding(kernel(arrays), portable(arrays))


@pytest.mark.parametrize(
    "tokens, size, gates, norms",
    [(7, 192, (2, 8), ((3, 4),)), (4, 64, (), ((0, 1), (6, 7))), (9, 128, (5,), ()), (1, 1536, (2,), ((3, 4),))],
)
def test_residual_sums_are_normed_as_by_the_portable_twin(tokens, size, gates, norms):
    x, vectors = values(0, 2, tokens, size), values(9, 2, 9 * size)
    updates = [values(index + 1, 2, tokens, size) for index in range(len(gates))]
    kernel, portable = added(gates, norms)
    assert_equal_but_for_one_rounding(kernel(x, updates, vectors), portable(x, updates, vectors))


def test_gradients_are_those_of_the_portable_twins():
    def loss(function):
        return lambda *arrays: sum(
            jnp.square(out.astype(jnp.float32)).sum() for out in jax.tree.leaves(function(*arrays))
        )

    kernel, portable = joined(2)
    arrays = streams([5, 3], 2, True)
    assert_equal_but_for_one_rounding(jax.grad(loss(kernel))(arrays), jax.grad(loss(portable))(arrays))

    kernel, portable = added((2,), ((0, 1),))
    arrays = values(0, 2, 5, 64), [values(1, 2, 5, 64)], values(2, 2, 6 * 64)
    every = (0, 1, 2)
    assert_equal_but_for_one_rounding(jax.grad(loss(kernel), every)(*arrays), jax.grad(loss(portable), every)(*arrays))
