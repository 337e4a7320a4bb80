import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion import rules

SIDES = st.integers(1, 5)
DTYPES = st.sampled_from([np.float32, np.float16])


@st.composite
def cases(draw):
    """A transform, the shape of the parameter it makes and the number of its sources."""
    a, b, c, d = (draw(SIDES) for _ in range(4))
    count = draw(st.integers(1, 4))
    return draw(
        st.sampled_from(
            [
                (rules.IDENTITY, (a, b), 1),
                (rules.JOIN, (count * a,), count),
                (rules.KERNEL, (a, count * b), count),
                (rules.CONVOLUTION, (a, b, c, d), 1),
                (rules.POINTWISE, (a, count * b), count),
                (rules.SWAPPED_JOIN, (2 * a,), 1),
                (rules.SWAPPED_KERNEL, (a, 2 * b), 1),
                (rules.patch_kernel(a, b), (a * a * b, c), 1),
                (rules.square_table(a), (a, a, b), 1),
            ]
        )
    )


@given(cases(), DTYPES, st.integers(0, 2**32 - 1))
def test_forward_undoes_backward_bit_by_bit(case, dtype, seed):
    transform, shape, count = case
    parameter = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    sources = transform.backward(parameter, count)
    assert [source.shape for source in sources] == list(transform.source_shapes(shape, count))
    again = transform.forward(sources)
    assert again.dtype == dtype
    np.testing.assert_array_equal(again, parameter)


@given(cases(), DTYPES, st.integers(0, 2**32 - 1))
def test_backward_undoes_forward_bit_by_bit(case, dtype, seed):
    transform, shape, count = case
    random = np.random.default_rng(seed)
    sources = [random.normal(size=shape).astype(dtype) for shape in transform.source_shapes(shape, count)]
    parameter = transform.forward(sources)
    assert parameter.shape == shape
    again = transform.backward(parameter, count)
    assert len(again) == count
    for mine, source in zip(again, sources, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_array_equal(mine, source)


@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=4),
    st.integers(1, 150),
    st.sampled_from([ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float32, np.float64]),
    st.booleans(),
)
def test_transposition_is_numpys_own_bit_by_bit(heights, width, dtype, strided):
    size = np.dtype(dtype).itemsize
    step = 2 if strided else 1
    random = np.random.default_rng(width)
    # Any bits, those of NaN too, since nothing may depend on what they mean.
    arrays = [
        random.integers(0, 256, (height, step * width * size), np.uint8).view(dtype)[:, ::step] for height in heights
    ]
    result = rules.transposed(arrays)
    assert result.dtype == dtype
    assert result.tobytes() == np.concatenate(arrays).T.tobytes()


def test_a_kernel_multiplies_as_the_linear_layers_it_joins():
    random = np.random.default_rng(0)
    x, weights = random.normal(size=(2, 3)), [random.normal(size=(5, 3)) for _ in range(2)]
    expected = np.concatenate([x @ weight.T for weight in weights], axis=1)
    np.testing.assert_allclose(x @ rules.KERNEL.forward(weights), expected, rtol=1e-12)


def test_a_swapped_kernel_exchanges_scale_and_shift():
    random = np.random.default_rng(0)
    x, weight, bias = random.normal(size=(2, 3)), random.normal(size=(8, 3)), random.normal(size=8)
    scale, shift = np.split(x @ weight.T + bias, 2, axis=1)
    ours = x @ rules.SWAPPED_KERNEL.forward([weight]) + rules.SWAPPED_JOIN.forward([bias])
    np.testing.assert_allclose(ours, np.concatenate([shift, scale], axis=1), rtol=1e-12)


def test_a_patch_kernel_multiplies_flattened_patches_as_the_convolution_would():
    random = np.random.default_rng(0)
    patch, weight = random.normal(size=(2, 2, 3)), random.normal(size=(5, 3, 2, 2))
    expected = np.einsum("hwc,ochw->o", patch, weight)
    ours = patch.reshape(-1) @ rules.patch_kernel(2, 3).forward([weight])
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_stacked_rule_numbers_its_layers_from_the_start_of_the_stack(number):
    stack = rules.stacked("blocks.", "transformer_blocks.{}.", range(4, 7), rules.linear("out", "attn.to_out"))
    kernel, bias = (rule for rule in stack if rule.layer == number)
    assert kernel.param == "blocks.out.kernel"
    assert kernel.sources == (f"transformer_blocks.{4 + number}.attn.to_out.weight",)
    assert bias.sources == (f"transformer_blocks.{4 + number}.attn.to_out.bias",)
