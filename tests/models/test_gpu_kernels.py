"""Each kernel against its portable twin: interpreted, anywhere, and compiled, on a Hopper GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.models import gpu_kernels, layers
from sd35flash_jax.models.streams import KEYS, QUERIES, VALUES, Norms, Projected, ResidualSum, Vectors

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
    portable = partial(layers.joined_heads, heads)
    kernel = partial(gpu_kernels.join_heads, heads, thirds=(QUERIES, KEYS, VALUES))
    return layers.differentiable(kernel, partial(layers._gradient, portable)), portable


ADDED = (
    layers.differentiable(
        lambda *arrays: gpu_kernels.add_and_norm(*arrays), partial(layers._gradient, layers._portable_add_and_norm)
    ),
    layers._portable_add_and_norm,
)


def values(seed: int, *shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_equal_but_for_one_rounding(made, expected):
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=1e-6)
        assert (one != other).mean() < 0.01


def streams(rows: list[int], heads: int, normed: bool, batch: int = 2, head_size: int = 64):
    return tuple(
        Projected(
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
    assert_equal_but_for_one_rounding(gpu_kernels.join_heads(heads, arrays, (KEYS,)), portable(arrays)[1:2])


def test_streams_whose_rows_the_attention_kernel_cannot_share_out_are_attended_to_by_the_library():
    arrays = streams([37, 21], 6, True)
    made, expected = layers._joint_attention(6, 50, arrays), layers._portable_joint_attention(6, 50, arrays)
    assert [stream.shape for stream in made] == [(2, 37, 384), (2, 21, 384)]
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0.02, atol=0.01)


def residual_sum(seed: int, tokens: int, size: int, gates: tuple[int, ...], batch: int = 2):
    updates = tuple(values(seed + index + 1, batch, tokens, size) for index in range(len(gates)))
    return ResidualSum(values(seed, batch, tokens, size), updates, vectors(seed + 9, 9 * size, batch), gates)


def norms(seed: int, size: int, *places: tuple[int, int], batch: int = 2):
    return Norms(vectors(seed, 6 * size, batch), places)


def vectors(seed: int, width: int, batch: int):
    """Those of three steps, of which the second is meant."""
    return Vectors(values(seed, 3 * batch, width), jnp.int32(batch))


@pytest.mark.parametrize(
    "tokens, size, gates, places",
    [(7, 192, (2, 8), ((3, 4),)), (4, 64, (), ((0, 1), (4, 5))), (9, 128, (5,), ()), (1, 1536, (2,), ((3, 4),))],
)
def test_residual_sums_are_normed_as_by_the_portable_twin(tokens, size, gates, places):
    arrays = [residual_sum(0, tokens, size, gates)], [norms(30, size, *places)]
    kernel, portable = ADDED
    assert_equal_but_for_one_rounding(kernel(*arrays), portable(*arrays))


def test_streams_of_different_sums_and_norms_are_served_together():
    sums = [residual_sum(0, 13, 192, (2, 8)), residual_sum(20, 6, 192, ()), ResidualSum(values(50, 2, 3, 192))]
    own = [norms(30, 192, (3, 4)), norms(31, 192, (0, 1), (4, 5)), norms(32, 192, (2, 0))]
    kernel, portable = ADDED
    assert_equal_but_for_one_rounding(kernel(sums, own), portable(sums, own))


def test_gradients_are_those_of_the_portable_twins():
    def loss(function):
        return lambda *arrays: sum(
            jnp.square(out.astype(jnp.float32)).sum() for out in jax.tree.leaves(function(*arrays))
        )

    kernel, portable = joined(2)
    arrays = streams([5, 3], 2, True)
    assert_equal_but_for_one_rounding(jax.grad(loss(kernel))(arrays), jax.grad(loss(portable))(arrays))

    kernel, portable = ADDED
    arrays = [residual_sum(0, 5, 64, (2,)), residual_sum(20, 3, 64, ())], [norms(30, 64, (0, 1)), norms(31, 64, (1, 2))]
    made, expected = (jax.grad(loss(each), (0, 1), allow_int=True)(*arrays) for each in (kernel, portable))
    assert_equal_but_for_one_rounding(floats(made), floats(expected))


def floats(tree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]
