import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd35flash_jax.checkpoint import parameter_shapes
from tests.training.tiny import TINY
from training.optimizer import adam, muon

IN_BLOCKS = (
    "transformer.dual_blocks.image.second_attention.qkv.kernel",
    "transformer.dual_blocks.context.attention.out.kernel",
    "transformer.last_block.image.feed_forward.linear_2.kernel",
    "clip_l.layers.qkv.kernel",
)
ELSEWHERE = (
    "transformer.patch_embed.kernel",
    "transformer.out.kernel",
    "transformer.dual_blocks.image.attention.qkv.bias",
    "transformer.dual_blocks.image.attention.key_norm.scale",
    "clip_l.token_embed.embedding",
    "clip_g.projection.kernel",
    "t5.relative_attention_bias.embedding",
)


def first_update(optimizer, gradients, params):
    update = jax.jit(optimizer.update).lower(gradients, optimizer.init(params), params)
    # It runs once: its compilation is what takes long.
    return update.compile({"xla_backend_optimization_level": 0})(gradients, optimizer.init(params), params)[0]


@pytest.fixture(scope="module")
def updated():
    """Some parameters, gradients that are nowhere small, and Muon's first update."""
    draw = np.random.default_rng(0)
    params, gradients = {}, {}
    for path in (*IN_BLOCKS, *ELSEWHERE):
        component, _, own = path.partition(".")
        shape = parameter_shapes(component, TINY)[own]
        params[path] = jnp.array(draw.standard_normal(shape, np.float32))
        gradients[path] = jnp.array(draw.choice([-1, 1], shape) * draw.uniform(0.5, 1, shape), jnp.float32)
    return params, gradients, first_update(muon(), gradients, params)


def matrices(array):
    """Layer by layer."""
    return np.asarray(array).reshape(-1, *array.shape[-2:])


def test_a_kernel_in_a_block_gets_a_nearly_orthogonal_update_of_one_size_against_its_gradient(updated):
    params, gradients, updates = updated
    for path in IN_BLOCKS:
        for update, gradient in zip(matrices(updates[path] + 0.02 * params[path]), matrices(gradients[path])):
            values = np.linalg.svd(update, compute_uv=False) / (0.2 * np.sqrt(max(update.shape)))
            assert values.max() < 1.3 and np.median(values) > 0.6, path
            assert np.vdot(update, gradient) < 0


def test_kernels_in_blocks_shrink_and_nothing_else_does(updated):
    params, gradients, _ = updated
    nothing = {path: jnp.zeros_like(array) for path, array in gradients.items()}
    for path, update in first_update(muon(), nothing, params).items():
        expected = -0.02 * params[path] if path in IN_BLOCKS else nothing[path]
        np.testing.assert_allclose(update, expected, atol=1e-7, err_msg=path)


def test_everything_else_gets_the_update_of_adam(updated):
    params, gradients, updates = updated
    expected = first_update(optax.adam(1.0, b2=0.99, nesterov=True), gradients, params)
    for path in ELSEWHERE:
        np.testing.assert_allclose(updates[path], expected[path], atol=1e-3, err_msg=path)


def test_adam_descends_by_one_at_first_and_is_not_thrown_by_a_single_large_gradient():
    optimizer, params = adam(), {"kernel": jnp.zeros(3)}
    small, large = {"kernel": jnp.array([0.01, -0.02, 0.0])}, {"kernel": jnp.array([300.0, 300.0, 300.0])}
    update, moments = optimizer.update(small, optimizer.init(params), params)
    np.testing.assert_allclose(update["kernel"], [-1, 1, 0], atol=1e-4)
    _, moments = optimizer.update(large, moments, params)
    for _ in range(100):
        update, moments = optimizer.update(small, moments, params)
    assert update["kernel"][0] < -0.05
