import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sd35flash_jax.quantize import dequantize, quantize

LARGEST = float(np.float32(1e30))


@st.composite
def weights(draw) -> tuple[np.ndarray, tuple[int, ...]]:
    """An array and the axes along which its values share a scale."""
    shape = draw(arrays.array_shapes(min_dims=1, max_dims=4, max_side=6))
    array = draw(arrays.arrays(np.float32, shape, elements=st.floats(-LARGEST, LARGEST, width=32)))
    shared = draw(st.sets(st.integers(0, array.ndim - 1), min_size=1))
    return array, tuple(shared)


@settings(max_examples=100, deadline=None)
@given(weights())
def test_no_weight_moves_by_more_than_half_a_scale(drawn):
    array, shared = drawn
    values, scales = quantize(array, shared)
    again = dequantize(values, scales)
    assert (values.dtype, scales.dtype, again.dtype) == (np.int8, np.float32, np.float32)
    assert scales.shape == tuple(1 if axis in shared else side for axis, side in enumerate(array.shape))
    assert np.abs(values.astype(int)).max() <= 127
    assert (np.abs(again - array) <= scales / 2 + 1e-6 * np.abs(array)).all()


def test_a_channel_of_zeros_stays_zero_beside_any_other():
    array = np.float32([[0.0, 3.0], [0.0, -1e-3]])
    again = dequantize(*quantize(array, (0,)))
    assert not again[:, 0].any() and again[0, 1] == np.float32(3.0)


def test_what_is_quantized_twice_is_what_was_quantized_once():
    array = np.random.default_rng(0).standard_normal((3, 40, 5), np.float32)
    once = dequantize(*quantize(array, (1,)))
    np.testing.assert_allclose(dequantize(*quantize(once, (1,))), once, rtol=1e-6)


def test_bfloat16_weights_are_quantized_as_their_float32_values_are():
    array = np.random.default_rng(0).standard_normal((8, 4), np.float32).astype(ml_dtypes.bfloat16)
    for found, expected in zip(quantize(array, (0,)), quantize(array.astype(np.float32), (0,))):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    array = np.ones((3, 4), np.float32)
    array[1, 2] = bad
    with pytest.raises(ValueError, match=r"vae\.conv\.kernel has 1 of 12 weights that are NaN or infinite"):
        quantize(array, (0,), "vae.conv.kernel")
