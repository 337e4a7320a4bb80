import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from sd35flash_jax.models.t5 import T5Encoder, position_buckets
from tests.parity.comparison import Pair, as_numpy, as_torch, max_error, record_bfloat16, run_ours
from tests.tiny_model import CONFIG, T5_VOCABULARY


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair("t5", CONFIG.t5, tmp_path_factory.mktemp("t5"))


def random_tokens(batch: int, tokens: int, seed: int = 0) -> np.ndarray:
    """The second half of each row is padding, which T5 attends to here."""
    ids = np.random.default_rng(seed).integers(3, T5_VOCABULARY, size=(batch, tokens)).astype(np.int32)
    ids[1:, (tokens + 1) // 2 :] = 0
    return ids


def ours(pair: Pair, tokens: np.ndarray, dtype: str = "float32") -> np.ndarray:
    return run_ours(T5Encoder.__call__, pair.ours[dtype], [tokens])[0]


def reference(pair: Pair, tokens: np.ndarray, dtype: str = "float32") -> np.ndarray:
    return as_numpy(pair.reference[dtype](as_torch(tokens)).last_hidden_state)


@pytest.mark.parametrize("tokens", [1, 2, 33, 77, 256, 300])
def test_states_equal_the_reference(pair, tokens, record_parity):
    ids = random_tokens(2, tokens)
    expected = reference(pair, ids)
    error, size = max_error(ours(pair, ids), expected), np.abs(expected).max()
    record_parity(f"T5, 2 x {tokens} tokens", error, 1e-4 * size, relative=error / size)


def test_bfloat16_rounds_no_worse_than_the_reference(pair, record_parity):
    inputs = [random_tokens(2, 77, seed) for seed in range(6)]
    dtypes = ("float32", "bfloat16")
    record_bfloat16(
        record_parity,
        "T5",
        {dtype: [ours(pair, ids, dtype) for ids in inputs] for dtype in dtypes},
        {dtype: [reference(pair, ids, dtype) for ids in inputs] for dtype in dtypes},
    )


@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (32, 64), (16, 128), (64, 256)])
def test_position_buckets_equal_the_reference(buckets, max_distance):
    tokens = 513
    positions = torch.arange(tokens)
    expected = T5Attention._relative_position_bucket(
        positions[None, :] - positions[:, None], num_buckets=buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(position_buckets(tokens, buckets, max_distance), expected.numpy())
