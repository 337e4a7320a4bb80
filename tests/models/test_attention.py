from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.models import layers
from sd35flash_jax.models.layers import attention, joint_attention
from sd35flash_jax.models.streams import Projected


def literal_attention(query, key, value, causal=False, scale=None):
    """Softmax attention in NumPy, float64."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    logits = np.einsum("btnd,bsnd->bnts", query, key) * (scale or query.shape[-1] ** -0.5)
    if causal:
        logits = np.where(np.tri(*logits.shape[-2:], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    mixed = np.einsum("bnts,bsnd->btnd", weights / weights.sum(axis=-1, keepdims=True), value)
    return mixed.reshape(*mixed.shape[:2], -1)


def operands(tokens: int, heads: int = 3, head_size: int = 64, dtype: str = "float32") -> list[jax.Array]:
    draw = np.random.default_rng(0)
    return [jnp.asarray(draw.normal(size=(2, tokens, heads, head_size)), dtype) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0, 0.25])
def test_attention_is_the_softmax_weighted_mean_of_the_values(causal, scale):
    query, key, value = operands(9)
    with jax.default_matmul_precision("highest"):
        mixed = attention(query, key, value, causal=causal, scale=scale)
    np.testing.assert_allclose(mixed, literal_attention(query, key, value, causal, scale), atol=1e-5)


def test_joint_attention_gives_each_stream_its_rows_and_leaves_out_keys_beyond_those_named():
    query, key, value = operands(9)
    together = jnp.stack([query, key, value], axis=2).reshape(2, 9, -1)
    with jax.default_matmul_precision("highest"):
        parts = joint_attention([Projected(together[:, :2], None), Projected(together[:, 2:], None)], 3, 5)
    assert [part.shape[1] for part in parts] == [2, 7]
    expected = literal_attention(query, key[:, :5], value[:, :5])
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-5)


@pytest.mark.parametrize("together", [1, 4, 6])
def test_attention_is_the_same_however_many_heads_are_taken_together(monkeypatch, together):
    monkeypatch.setattr(layers, "_LOGITS_IN_CACHE", together * 9 * 9)
    query, key, value = operands(9)
    with jax.default_matmul_precision("highest"):
        mixed = layers._attention_by_heads(query, key, value, 0.125)
    np.testing.assert_allclose(mixed, literal_attention(query, key, value), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_by_heads_and_its_gradient_are_those_of_its_twin(dtype):
    arrays = [array.astype(dtype) for array in operands(9)]

    def twin(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        mixed = jax.nn.dot_product_attention(query, key, value, implementation="xla")
        return mixed.reshape(*mixed.shape[:2], -1)

    with jax.default_matmul_precision("highest"):
        expected, expected_vjp = jax.vjp(twin, *arrays)
        mixed, vjp = jax.vjp(lambda *arrays: layers._attention_by_heads(*arrays, 0.125), *arrays)
        gradients = zip((mixed, *vjp(expected)), (expected, *expected_vjp(expected)))
    for found, wanted in gradients:
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == "float32" else 4e-2
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [8, 9])
def test_a_token_added_to_an_odd_number_changes_neither_attention_nor_its_gradient(tokens, causal):
    plain = partial(jax.nn.dot_product_attention, implementation="xla", is_causal=causal)
    arrays = operands(tokens)
    with jax.default_matmul_precision("highest"):
        expected, expected_vjp = jax.vjp(plain, *arrays)
        mixed, vjp = jax.vjp(partial(layers._with_even_tokens, plain), *arrays)
        for found, wanted in zip((mixed, *vjp(expected)), (expected, *expected_vjp(expected))):
            np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [77, 154, 1357])
def test_the_flash_kernels_gradient_agrees_with_its_portable_twin(tokens, causal):
    arrays = operands(tokens, dtype="bfloat16")

    def gradients(device: jax.Device, dtype: str) -> list[np.ndarray]:
        placed = [jax.device_put(array.astype(dtype), device) for array in arrays]
        loss = jax.grad(lambda *arrays: jnp.sum(jnp.sin(attention(*arrays, causal=causal))), (0, 1, 2))
        return [np.asarray(array, np.float64) for array in jax.jit(loss)(*placed)]

    exact = gradients(jax.devices("cpu")[0], "float32")
    for found, wanted in zip(gradients(jax.devices("gpu")[0], "bfloat16"), exact):
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [77, 333, 1357])
def test_the_flash_kernel_agrees_with_its_portable_twin(tokens, causal):
    query, key, value = operands(tokens, dtype="bfloat16")
    expected = literal_attention(query, key, value, causal)

    def relative_error(device: jax.Device) -> float:
        arrays = jax.device_put((query, key, value), device)
        mixed = jax.jit(lambda *arrays: attention(*arrays, causal=causal))(*arrays)
        return np.linalg.norm(np.asarray(mixed, np.float64) - expected) / np.linalg.norm(expected)

    lowered = jax.jit(lambda *arrays: attention(*arrays, causal=causal)).lower(query, key, value).as_text()
    assert "cudnn" in lowered, "the GPU program uses the kernel"
    flash, portable = relative_error(jax.devices("gpu")[0]), relative_error(jax.devices("cpu")[0])
    assert flash < 1e-2 and portable < 1e-2
