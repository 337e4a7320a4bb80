from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from sd35flash_jax.checkpoint import abstract_component
from sd35flash_jax.config import COMPONENTS
from sd35flash_jax.models.layers import embed
from tests.tiny_model import CONFIG

TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
LATENTS = jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32)
PIXELS = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
CALLS = {
    "transformer": (
        lambda module, latents: module(latents, jnp.ones(1), jnp.ones((1, 5, 96)), jnp.ones((1, 80))),
        LATENTS,
    ),
    "vae": (lambda module, latents, pixels: (module.decode(latents), module.encode(pixels)), LATENTS, PIXELS),
    "clip_l": (lambda module, tokens: module(tokens), TOKENS),
    "clip_g": (lambda module, tokens: module(tokens), TOKENS),
    "t5": (lambda module, tokens: module(tokens), TOKENS),
}


def products(jaxpr):
    """The matrix products and convolutions of a program, with those of every loop and function it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_every_product_is_of_operands_of_the_parameters_dtype(name, dtype):
    call, *inputs = CALLS[name]
    graph, state = nnx.split(abstract_component(name, CONFIG))
    state = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, dtype), state)
    program = jax.make_jaxpr(lambda state, *arrays: call(nnx.merge(graph, state), *arrays))(state, *inputs)
    operands = [variable.aval.dtype for product in products(program.jaxpr) for variable in product.invars]
    assert len(operands) > 10
    assert set(operands) == {jnp.dtype(dtype)}


def test_the_gradient_of_a_table_s_row_counts_every_use_in_bfloat16():
    uses = np.array([0] * 3000 + [4])

    def total(rows):
        return embed(SimpleNamespace(embedding=rows), uses).astype(jnp.float32).sum()

    gradient = jax.grad(total)(jnp.ones((5, 3), jnp.bfloat16))
    expected = np.zeros((5, 3), np.float32)
    expected[0], expected[4] = 3000, 1
    np.testing.assert_allclose(np.asarray(gradient, np.float32), expected, rtol=1 / 256)
