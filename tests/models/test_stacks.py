"""Blocks as stacks and as lists: the same model, however it is loaded, run, changed and saved."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from sd35flash_jax import FlashPipeline, ModelConfig
from sd35flash_jax.checkpoint import load_checkpoint, parameters, save_checkpoint
from sd35flash_jax.models.layers import unstacked
from tests.tiny_model import CONFIG


def pipeline(folder, stacked: bool) -> FlashPipeline:
    checkpoint = load_checkpoint(folder, ("transformer", "t5"), "float32", stacked=stacked)
    return FlashPipeline(CONFIG, checkpoint.components, {}, max_t5_tokens=8)


@pytest.fixture(scope="module")
def stacked(small_checkpoint) -> FlashPipeline:
    return pipeline(small_checkpoint, True)


@pytest.fixture
def listed(small_checkpoint) -> FlashPipeline:
    return pipeline(small_checkpoint, False)


def latents(pipe: FlashPipeline) -> np.ndarray:
    conditioning = pipe.encode_tokens({"t5": np.arange(8, dtype=np.int32)[None]})
    return np.asarray(pipe.denoise(pipe.noise(0, 1, 32, 48), conditioning, steps=2))


def test_lists_are_loaded_as_a_stack_is_cut(stacked, listed):
    for name, component in listed.components.items():
        assert isinstance(getattr(component, component.STACKS[-1]), nnx.List)
        cut, loaded = parameters(unstacked(stacked.components[name])), parameters(component)
        assert cut.keys() == loaded.keys()
        assert all(np.array_equal(cut[param], loaded[param]) for param in cut)


def test_lists_give_the_latents_of_stacks(stacked, listed):
    np.testing.assert_allclose(latents(listed), latents(stacked), atol=2e-5)


def test_lists_are_saved_as_stacks_are(small_checkpoint, listed, tmp_path):
    config = ModelConfig(transformer=CONFIG.transformer, t5=CONFIG.t5)
    save_checkpoint(tmp_path / "saved", config, listed.components)
    saved = parameters(load_checkpoint(tmp_path / "saved", ("transformer",), "float32").components["transformer"])
    first = parameters(load_checkpoint(small_checkpoint, ("transformer",), "float32").components["transformer"])
    assert all(np.array_equal(saved[param], first[param]) for param in first)


def test_a_lora_changes_lists_as_it_changes_stacks_and_is_taken_back(stacked, listed, tmp_path):
    size, draw = CONFIG.transformer.hidden_size, np.random.default_rng(0)
    tensors = {}
    for block in range(CONFIG.transformer.depth):
        for module in ("attn.to_q", "attn.to_out.0"):
            key = f"transformer.transformer_blocks.{block}.{module}"
            tensors |= {
                f"{key}.lora_A.weight": draw.standard_normal((2, size), np.float32),
                f"{key}.lora_B.weight": draw.standard_normal((size, 2), np.float32),
            }
    save_file(tensors, tmp_path / "lora.safetensors")
    before = jax.tree.map(np.asarray, parameters(listed.components["transformer"]))
    plain = latents(listed)
    for pipe in (listed, stacked):
        pipe.load_lora(tmp_path / "lora.safetensors", 0.5)
    changed = latents(listed)
    np.testing.assert_allclose(changed, latents(stacked), atol=2e-5)
    assert np.abs(changed - plain).max() > 1e-2
    for pipe in (listed, stacked):
        pipe.unload_lora()
    after = parameters(listed.components["transformer"])
    assert all(np.array_equal(before[param], after[param]) for param in before)
    np.testing.assert_array_equal(latents(listed), plain)
