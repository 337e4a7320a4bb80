"""The counted arithmetic against XLA's own count, at true widths. Nothing is compiled or allocated. XLA counts the body
of a loop once, so each stack of blocks here holds one block, and attention is not the one that loops over heads."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cases import Case, Request, flops
from benchmarks.flops import clip_flops, decoder_flops, t5_flops, transformer_flops
from sd35flash_jax.checkpoint import abstract_component
from sd35flash_jax.config import PRESETS, ModelConfig
from sd35flash_jax.models import layers

MEDIUM = PRESETS["sd3.5-medium"]


def shape(*sides, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sides, dtype)


@pytest.fixture(autouse=True)
def attention_in_one_piece(monkeypatch):
    monkeypatch.setattr(layers, "_for_one_device", lambda: False)


def counted_by_xla(name, config, call, *inputs) -> float:
    module = abstract_component(name, ModelConfig(**{name: config}))
    return jax.jit(call).lower(module, *inputs).cost_analysis()["flops"]


def test_transformer_flops():
    for dual in (0, 1):
        config = replace(MEDIUM.transformer, depth=3, dual_attention_blocks=dual)
        if dual == 0:
            config = replace(config, depth=2)
        inputs = shape(1, 48, 32, 16), shape(1), shape(1, 333, 4096), shape(1, 2048)
        found = counted_by_xla("transformer", config, lambda module, *inputs: module(*inputs), *inputs)
        assert transformer_flops(config, 48, 32, 333) == pytest.approx(found, rel=0.01)


def test_depth_and_dual_blocks_add_equal_shares():
    def count(depth, dual):
        return transformer_flops(replace(MEDIUM.transformer, depth=depth, dual_attention_blocks=dual), 64, 64, 333)

    assert count(24, 0) - count(3, 0) == 21 * (count(4, 0) - count(3, 0))
    assert count(24, 13) - count(24, 0) == 13 * (count(24, 1) - count(24, 0))


def test_an_evaluation_at_1024_px_is_the_known_11_tflop():
    assert transformer_flops(MEDIUM.transformer, 128, 128, 333) == pytest.approx(11.3e12, rel=0.02)


def test_decoder_flops():
    # XLA does not count the products with the padding at the borders, so the image must not be too small.
    found = counted_by_xla("vae", MEDIUM.vae, lambda vae, latents: vae.decode(latents), shape(1, 48, 32, 16))
    assert decoder_flops(MEDIUM.vae, 48, 32) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
def test_clip_flops(name):
    config = replace(getattr(MEDIUM, name), layers=1)
    found = counted_by_xla(name, config, lambda clip, ids: clip(ids), shape(1, 77, dtype=jnp.int32))
    assert clip_flops(config, 77) == pytest.approx(found, rel=0.02)
    assert clip_flops(replace(config, layers=5), 77) - clip_flops(config, 77) == pytest.approx(4 * found, rel=0.04)


def test_t5_flops():
    config = replace(MEDIUM.t5, layers=1)
    found = counted_by_xla("t5", config, lambda t5, ids: t5(ids), shape(1, 256, dtype=jnp.int32))
    assert t5_flops(config, 256) == pytest.approx(found, rel=0.02)
    assert t5_flops(MEDIUM.t5, 256) == 24 * t5_flops(config, 256)


def test_items_add_up():
    request = Request(MEDIUM, (512,), (2,), (), "bfloat16", steps=4, repeats=1, seconds=1.0)
    count = {
        item: flops(Case(item, 512, 2), request)
        for item in ("clip_l", "clip_g", "t5", "encode", "evaluation", "step", "denoise", "decode", "image")
    }
    assert count["encode"] == count["clip_l"] + count["clip_g"] + count["t5"]
    assert count["denoise"] == 4 * count["evaluation"] == 4 * count["step"]
    assert count["image"] == count["denoise"] + count["decode"]
    assert flops(Case("prompt_to_pixels", 512, 2), request) == count["image"] + count["encode"]
    assert flops(Case("image", 512, 1), request) * 2 == count["image"]
