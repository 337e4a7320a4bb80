import numpy as np
import pytest

from sd35flash_jax.models.vae import VAE
from tests.parity.comparison import Pair, as_numpy, as_torch, max_error, record_bfloat16, rounded, run_ours
from tests.tiny_model import CONFIG

DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair("vae", CONFIG.vae, tmp_path_factory.mktemp("vae"))


def random_latents(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Model-scale latents."""
    shape = (batch, height, width, CONFIG.vae.latent_channels)
    return rounded(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def random_pixels(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Multiples of 1/256 in [0, 1]: in [-1, 1] too, bfloat16 holds them exactly."""
    integers = np.random.default_rng(seed).integers(0, 257, size=(batch, height, width, 3))
    return (integers / 256).astype(np.float32)


def encode(pair: Pair, pixels: np.ndarray, dtype: str = "float32") -> np.ndarray:
    return run_ours(VAE.encode, pair.ours[dtype], [pixels])[0]


def decode(pair: Pair, latents: np.ndarray, dtype: str = "float32") -> np.ndarray:
    return run_ours(VAE.decode, pair.ours[dtype], [latents])[0]


def reference_encode(pair: Pair, pixels: np.ndarray, dtype: str = "float32") -> np.ndarray:
    images = as_torch(pixels.transpose(0, 3, 1, 2) * 2 - 1, dtype)
    mean = as_numpy(pair.reference[dtype].encode(images).latent_dist.mode())
    return (mean.transpose(0, 2, 3, 1) - CONFIG.vae.shift) * CONFIG.vae.scale


def reference_decode(pair: Pair, latents: np.ndarray, dtype: str = "float32") -> np.ndarray:
    raw = as_torch(latents.transpose(0, 3, 1, 2) / CONFIG.vae.scale + CONFIG.vae.shift, dtype)
    images = as_numpy(pair.reference[dtype].decode(raw).sample)
    return np.clip(images.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)


@pytest.mark.parametrize("batch, height, width", [(2, 24, 40), (1, 72, 16)])
def test_encoding_equals_the_reference(pair, batch, height, width, record_parity):
    pixels = random_pixels(batch, height, width)
    expected = reference_encode(pair, pixels)
    error = max_error(encode(pair, pixels), expected)
    record_parity(f"VAE encode, {batch} x {height}x{width}", error, 1e-4, relative=error / np.abs(expected).max())


@pytest.mark.parametrize("batch, height, width", [(2, 3, 5), (1, 9, 2)])
def test_decoding_equals_the_reference(pair, batch, height, width, record_parity):
    latents = random_latents(batch, height, width)
    expected = reference_decode(pair, latents)
    assert np.mean((expected > 0) & (expected < 1)) > 0.8  # Most pixels are compared, not clipped.
    error = max_error(decode(pair, latents), expected)
    record_parity(f"VAE decode, {batch} x {8 * height}x{8 * width}", error, 1e-4, relative=error)


def test_bfloat16_encoding_rounds_no_worse_than_the_reference(pair, record_parity):
    inputs = [random_pixels(2, 24, 40, seed) for seed in range(4)]
    record_bfloat16(
        record_parity,
        "VAE encode",
        {dtype: [encode(pair, pixels, dtype) for pixels in inputs] for dtype in DTYPES},
        {dtype: [reference_encode(pair, pixels, dtype) for pixels in inputs] for dtype in DTYPES},
    )


def test_bfloat16_decoding_rounds_no_worse_than_the_reference(pair, record_parity):
    inputs = [random_latents(2, 3, 5, seed) for seed in range(4)]
    record_bfloat16(
        record_parity,
        "VAE decode",
        {dtype: [decode(pair, latents, dtype) for latents in inputs] for dtype in DTYPES},
        {dtype: [reference_decode(pair, latents, dtype) for latents in inputs] for dtype in DTYPES},
    )
