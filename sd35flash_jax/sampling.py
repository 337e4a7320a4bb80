"""velocity -> latents: guided Euler steps along the rectified flow, in one compiled program.

The step count, the sigmas and the guidance are values, not shapes: a new one recompiles nothing. What recompiles is a
new batch, height, width, token count or dtype, and a schedule of more than 63 steps (127, 191, ...).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sd35flash_jax.models.mmdit import MMDiT
from sd35flash_jax.schedule import TRAIN_TIMESTEPS
from sd35flash_jax.text import Conditioning

STEP_CAPACITY = 64


@jax.jit
def velocity(
    transformer: MMDiT, latents: Float[Array, "b h w c"], timestep: Float[Array, " b"], conditioning: Conditioning
) -> Float[Array, "b h w c"]:
    """One evaluation of the transformer, as float32."""
    return transformer(latents, timestep, conditioning.context, conditioning.pooled).astype(jnp.float32)


@jax.jit
def euler_steps(
    transformer: MMDiT,
    latents: Float[Array, "b h w c"],
    sigmas: Float[Array, " capacity"],
    start: Int[Array, ""],
    stop: Int[Array, ""],
    conditionings: tuple[Conditioning, Conditioning],
    guidance: Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """Take the Euler steps `start` to `stop - 1` from `sigmas[start]` to `sigmas[stop]`.

    `conditionings` holds the positive and the negative one. Up to a guidance of 1 only the positive one is evaluated;
    above it the velocity is `negative + guidance * (positive - negative)` (arXiv 2207.12598), as a weighted sum whose
    terms are evaluated one after the other, so that both cases are one program with one copy of the network.
    """
    both = jax.tree.map(lambda *pair: jnp.stack(pair), *conditionings)
    guided = guidance > 1
    weights = jnp.where(guided, jnp.stack([guidance, 1 - guidance]), jnp.array([1.0, 0.0]))

    def step(index: Array, latents: Array) -> Array:
        timestep = jnp.broadcast_to(sigmas[index] * TRAIN_TIMESTEPS, latents.shape[:1])

        def add_term(term: Array, total: Array) -> Array:
            conditioning = jax.tree.map(lambda array: array[term], both)
            return total + weights[term] * velocity(transformer, latents, timestep, conditioning)

        guided_velocity = jax.lax.fori_loop(0, 1 + guided, add_term, jnp.zeros_like(latents))
        return latents + (sigmas[index + 1] - sigmas[index]) * guided_velocity

    return jax.lax.fori_loop(start, stop, step, latents)


def denoise(
    transformer: MMDiT,
    noise: Float[Array, "b h w c"],
    conditioning: Conditioning,
    negative: Conditioning,
    sigmas: np.ndarray,
    guidance: float,
    on_step: Callable[[], object] | None = None,
) -> Float[Array, "b h w c"]:
    """Denoise model-scale noise at `sigmas[0]` to latents at `sigmas[-1]`, float32.

    With `on_step` the same compiled program takes one step at a time and reports after each.
    """
    steps = len(sigmas) - 1
    padded = np.zeros(-(-len(sigmas) // STEP_CAPACITY) * STEP_CAPACITY, np.float32)
    padded[: len(sigmas)] = sigmas

    def run(latents: Array, start: int, stop: int) -> Array:
        both = (conditioning, negative)
        return euler_steps(transformer, latents, padded, np.int32(start), np.int32(stop), both, np.float32(guidance))

    if on_step is None:
        return run(noise, 0, steps)
    latents = noise
    for index in range(steps):
        latents = run(latents, index, index + 1).block_until_ready()
        on_step()
    return latents
