from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sd35flash_jax.checkpoint import abstract_component, parameters, with_parameters
from sd35flash_jax.distill.lora import init_lora, merge_lora
from sd35flash_jax.distill.mmdit import image_features, mmdit_networks
from sd35flash_jax.text import Conditioning
from tests.tiny_model import CONFIG, random_parameters

PARAMS = {path: jnp.array(array) for path, array in random_parameters("transformer").items()}
KEY = jax.random.key(0)
LATENTS, TIMESTEP = jax.random.normal(KEY, (2, 4, 6, 16)), jnp.array([500.0, 100.0])
TEXT = Conditioning(jax.random.normal(KEY, (2, 10, 96)), jax.random.normal(KEY, (2, 80)))


@pytest.fixture(scope="module")
def features():
    """The image stream after each of four blocks (two dual, one plain, the last), for these parameters."""

    def run(params):
        model = with_parameters(abstract_component("transformer", CONFIG), params)
        return image_features(model, LATENTS, TIMESTEP, TEXT, (1, 2, 3, 4))

    return jax.jit(run)


def first_blocks(depth):
    """A transformer of the first blocks alone, of which the last one's image stream, normed, is the output."""
    model = with_parameters(abstract_component("transformer", CONFIG), PARAMS)
    layers = [("dual_blocks", 0), ("dual_blocks", 1), ("blocks", 0)]
    stack, layer = layers[depth - 1]
    model.last_block = jax.tree.map(lambda array: array[layer], getattr(model, stack))
    for name in model.STACKS:
        kept = sum(stack == name for stack, _ in layers[: depth - 1])
        setattr(model, name, jax.tree.map(lambda array: array[:kept], getattr(model, name)) if kept else None)  # noqa: B023
    model.out_modulation = jax.tree.map(jnp.zeros_like, model.out_modulation)
    model.out.kernel = nnx.Param(jnp.eye(CONFIG.transformer.hidden_size))
    model.out.bias = nnx.Param(jnp.zeros(CONFIG.transformer.hidden_size))
    return model


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_features_are_those_of_a_transformer_of_the_first_blocks_alone(depth, features):
    model = first_blocks(depth)
    expected = model.patchify(model(LATENTS, TIMESTEP, TEXT.context, TEXT.pooled))
    np.testing.assert_allclose(jax.nn.standardize(features(PARAMS)[depth - 1]), expected, atol=1e-4)


def test_features_depend_on_the_blocks_before_them(features):
    before = features(PARAMS)
    for block, (stack, layer) in enumerate(
        [("dual_blocks", 0), ("dual_blocks", 1), ("blocks", 0), ("last_block", ...)]
    ):
        name = f"{stack}.image.feed_forward.linear_2.kernel"
        after = features(PARAMS | {name: PARAMS[name].at[layer].multiply(2)})
        assert [np.array_equal(*pair) for pair in zip(before, after)] == [depth < block for depth in range(4)]


def test_rematerialised_blocks_give_the_same_gradients_for_less_memory():
    config = replace(CONFIG, transformer=replace(CONFIG.transformer, depth=7, dual_attention_blocks=0))
    shapes = {path: array.shape for path, array in parameters(abstract_component("transformer", config)).items()}
    params = {path: jnp.resize(PARAMS[path.replace("dual_", "")], shape) for path, shape in shapes.items()}
    # So many rows that it is their activations that take memory.
    latents, timestep, text = jax.tree.map(lambda array: jnp.concatenate([array] * 8), (LATENTS, TIMESTEP, TEXT))

    def loss(params, rematerialise):
        networks = mmdit_networks(config, False, (3,), rematerialise)
        velocity = networks.student(params, params)(latents, timestep, text)
        [features] = networks.features(params, params)(latents, timestep, text)
        return jnp.mean(jnp.square(velocity)) + jnp.mean(jnp.sin(features))

    def compiled(rematerialise):
        gradient = jax.jit(jax.grad(partial(loss, rematerialise=rematerialise)))
        return gradient.lower(params).compile(compiler_options={"xla_backend_optimization_level": 0})

    plain, rematerialised = compiled(False), compiled(True)
    for (path, gradient), again in zip(plain(params).items(), rematerialised(params).values()):
        np.testing.assert_allclose(again, gradient, atol=1e-4 * np.abs(gradient).max(), err_msg=path)
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (plain, rematerialised)]
    assert sizes[1] < 0.6 * sizes[0]


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
