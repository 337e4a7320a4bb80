"""Small networks for the recipe's tests, each in JAX and, where a twin is wanted, in NumPy at double precision."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 2


def random_mlp(seed: int, hidden: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"A": (SIZE, hidden), "t": (hidden,), "C": (3, hidden), "D": (hidden, SIZE)}
    return {name: random.standard_normal(shape) for name, shape in shapes.items()}


def hidden_layer(xp, params, latents, timestep, conditioning):
    features = latents @ params["A"] + timestep[:, None] / 1000 * params["t"] + conditioning @ params["C"]
    return xp.tanh(features)


def mlp(params):
    """latents `(b, 2)`, timestep, conditioning `(b, 3)` -> velocity."""
    return lambda latents, timestep, conditioning: (
        hidden_layer(jnp, params, latents, timestep, conditioning) @ params["D"]
    )


def mlp_features(params):
    return lambda latents, timestep, conditioning: [hidden_layer(jnp, params, latents, timestep, conditioning)] * 2


def numpy_mlp(params):
    """The same at a sigma, in double precision."""

    def velocity(latents, sigma, conditioning):
        timestep = np.broadcast_to(1000 * np.asarray(sigma, float), len(latents))
        return hidden_layer(np, params, latents, timestep, conditioning) @ params["D"]

    return velocity


def numeric_gradient(loss: Callable[[dict[str, np.ndarray]], float], params: dict[str, np.ndarray]):
    """Central differences."""
    gradient = {}
    for name, array in params.items():
        gradient[name] = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = array.copy()
                moved[index] += step
                values.append(loss(params | {name: moved}))
            gradient[name][index] = (values[0] - values[1]) / 2e-5
    return gradient


def assert_same_gradients(by_jax, by_hand) -> None:
    scale = max(np.abs(array).max() for array in by_hand.values())
    assert scale > 1e-3
    for name, array in by_hand.items():
        np.testing.assert_allclose(by_jax[name], array, atol=2e-5 * scale, err_msg=name)


def is_zero(tree) -> bool:
    return all(not np.any(leaf) for leaf in jax.tree.leaves(tree))
