from dataclasses import replace

import numpy as np
import pytest
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from sd35flash_jax.config import MMDiTConfig
from sd35flash_jax.models.mmdit import MMDiT, sincos_table
from tests.parity.comparison import Pair, as_numpy, as_torch, max_error, record_bfloat16, rounded, run_ours
from tests.tiny_model import CONFIG

MEDIUM = CONFIG.transformer
STYLES = {
    "SD3: q and k not normed": replace(MEDIUM, qk_norm=False, dual_attention_blocks=0),
    "SD3.5-large: q and k normed": replace(MEDIUM, dual_attention_blocks=0),
    "SD3.5-medium: second attention in the first blocks": MEDIUM,
    "second attention in every block": replace(MEDIUM, dual_attention_blocks=MEDIUM.depth),
}


@pytest.fixture(scope="module", params=STYLES)
def pair(request, tmp_path_factory):
    return request.param, Pair("transformer", STYLES[request.param], tmp_path_factory.mktemp("mmdit"))


def random_inputs(config: MMDiTConfig, batch: int, height: int, width: int, tokens: int, seed: int = 0):
    random = np.random.default_rng(seed)
    arrays = [
        random.normal(size=(batch, height, width, config.latent_channels)),
        random.uniform(0, 1000, size=batch),
        random.normal(size=(batch, tokens, config.context_size)),
        random.normal(size=(batch, config.pooled_size)),
    ]
    return [rounded(array.astype(np.float32)) for array in arrays]


def ours(pair: Pair, inputs, dtype: str = "float32") -> np.ndarray:
    return run_ours(MMDiT.__call__, pair.ours[dtype], inputs)[0]


def reference(pair: Pair, inputs, dtype: str = "float32") -> np.ndarray:
    latents, timestep, context, pooled = inputs
    velocity = pair.reference[dtype](
        hidden_states=as_torch(latents.transpose(0, 3, 1, 2), dtype),
        timestep=as_torch(timestep),
        encoder_hidden_states=as_torch(context, dtype),
        pooled_projections=as_torch(pooled, dtype),
    ).sample
    return as_numpy(velocity).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    "batch, height, width, tokens",
    [(3, 10, 14, 9), (1, 48, 26, 40)],
    ids=["odd-numbers-of-tokens", "the-whole-position-table"],
)
def test_velocity_equals_the_reference(pair, batch, height, width, tokens, record_parity):
    style, models = pair
    inputs = random_inputs(models.ours["float32"].config, batch, height, width, tokens)
    expected = reference(models, inputs)
    error = max_error(ours(models, inputs), expected)
    item = f"MMDiT, {style}, {batch} x {height}x{width} latents, {tokens} text tokens"
    record_parity(item, error, 1e-4, relative=error / np.abs(expected).max())


def test_each_sample_has_its_own_timestep(pair, record_parity):
    style, models = pair
    timesteps = (0.0, 1000.0, 8.929)
    inputs = random_inputs(models.ours["float32"].config, len(timesteps), 10, 14, 9)
    inputs[0], inputs[2], inputs[3] = (np.repeat(inputs[i][:1], len(timesteps), axis=0) for i in (0, 2, 3))
    inputs[1] = np.array(timesteps, np.float32)
    expected = reference(models, inputs)
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    error = max_error(ours(models, inputs), expected)
    record_parity(f"MMDiT, {style}, timesteps {timesteps}", error, 1e-4, relative=error / np.abs(expected).max())


def test_bfloat16_rounds_no_worse_than_the_reference(pair, record_parity):
    style, models = pair
    inputs = [random_inputs(models.ours["float32"].config, 3, 10, 14, 9, seed) for seed in range(6)]
    dtypes = ("float32", "bfloat16")
    record_bfloat16(
        record_parity,
        f"MMDiT, {style}",
        {dtype: [ours(models, arrays, dtype) for arrays in inputs] for dtype in dtypes},
        {dtype: [reference(models, arrays, dtype) for arrays in inputs] for dtype in dtypes},
    )


@pytest.mark.parametrize("side, channels, base", [(24, 64, 12), (192, 32, 64), (384, 16, 64), (7, 128, 7)])
def test_position_table_equals_the_reference(side, channels, base, record_parity):
    expected = get_2d_sincos_pos_embed(channels, side, base_size=base, output_type="pt").float().numpy()
    error = max_error(np.asarray(sincos_table(side, channels, base)), expected.reshape(side, side, channels))
    record_parity(f"Position table, side {side}, base {base}", error, 1e-5, relative=error)
