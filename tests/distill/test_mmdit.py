import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.checkpoint import abstract_component, with_parameters
from sd35flash_jax.distill.lora import init_lora, merge_lora
from sd35flash_jax.distill.mmdit import first_blocks, image_stream
from sd35flash_jax.text import Conditioning
from tests.tiny_model import CONFIG, random_parameters

PARAMS = {path: jnp.array(array) for path, array in random_parameters("transformer").items()}


@pytest.fixture(scope="module")
def stream():
    """The image stream after some of four blocks (two dual, one plain, the last), for these parameters."""
    key = jax.random.key(0)
    latents = jax.random.normal(key, (2, 4, 6, 16))
    text = Conditioning(jax.random.normal(key, (2, 10, 96)), jax.random.normal(key, (2, 80)))

    def run(params, depth):
        model = with_parameters(abstract_component("transformer", CONFIG), params)
        return image_stream(first_blocks(model, depth), latents, jnp.array([500.0, 100.0]), text)

    return jax.jit(run, static_argnums=1)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_features_depend_on_the_first_blocks_alone(depth, stream):
    before = stream(PARAMS, depth)
    assert before.shape == (2, 6, CONFIG.transformer.hidden_size)
    for number, (stack, layer) in enumerate(
        [("dual_blocks", 0), ("dual_blocks", 1), ("blocks", 0), ("last_block", ...)]
    ):
        name = f"{stack}.image.feed_forward.linear_2.kernel"
        after = stream(PARAMS | {name: PARAMS[name].at[layer].multiply(2)}, depth)
        assert np.array_equal(before, after) == (number >= depth)


def test_features_are_normed_tokens_whatever_the_final_layer_says(stream):
    features = stream(PARAMS, 2)
    np.testing.assert_allclose(features.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(-1), 1, atol=1e-3)
    changed = {path: PARAMS[path] + 1 for path in ("out.kernel", "out.bias", "out_modulation.kernel")}
    np.testing.assert_array_equal(stream(PARAMS | changed, 2), features)


def test_a_fresh_lora_changes_nothing_and_a_trained_one_adds_its_product_to_each_block():
    lora = jax.jit(init_lora, static_argnums=2)(jax.random.key(0), PARAMS, 3)
    same = merge_lora(PARAMS, lora)
    assert all(np.array_equal(same[path], PARAMS[path]) for path in PARAMS)
    assert {path.split(".")[0] for path in lora} == {"dual_blocks", "blocks", "last_block"}
    trained = {path: array + 0.1 for path, array in lora.items()}
    path = "dual_blocks.image.attention.qkv.kernel"
    expected = [
        kernel + a @ b
        for kernel, a, b in zip(*(np.array(x) for x in (PARAMS[path], trained[path + ".a"], trained[path + ".b"])))
    ]
    np.testing.assert_allclose(merge_lora(PARAMS, trained)[path], expected, rtol=1e-4, atol=1e-4)
