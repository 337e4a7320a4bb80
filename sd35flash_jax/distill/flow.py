"""The rectified flow's vocabulary: `x_sigma = (1 - sigma) clean + sigma noise`, velocity `noise - clean`, timestep
`1000 sigma`. Latents are `(b, ...)` of any rank; a sigma is one number, or `(b,)`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sd35flash_jax.schedule import TRAIN_TIMESTEPS

Sigma = Float[Array, ""] | Float[Array, " b"] | float
Velocity = Callable[[Float[Array, "b ..."], Float[Array, " b"], Any], Float[Array, "b ..."]]
"""latents, timestep in [0, 1000], conditioning -> velocity: a network with its parameters bound."""


def evaluate(
    velocity: Velocity, latents: Float[Array, "b ..."], sigma: Sigma, conditioning: Any
) -> Float[Array, "b ..."]:
    """The velocity at a noise level, float32."""
    return velocity(latents, timesteps(sigma, latents), conditioning).astype(jnp.float32)


def timesteps(sigma: Sigma, latents: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """The timestep of each row of latents at a noise level."""
    return jnp.broadcast_to(jnp.asarray(sigma) * TRAIN_TIMESTEPS, latents.shape[:1])


def guided(velocity: Velocity, conditioning: Any, negative: Any, guidance: float) -> Velocity:
    """`negative + guidance (positive - negative)`, classifier-free guidance (arXiv 2207.12598) as a velocity of its
    own; both halves are evaluated as one batch of twice the size. A guidance of 1 evaluates the positive half alone.
    """
    if guidance == 1:
        return lambda latents, timestep, _: velocity(latents, timestep, conditioning)
    both = jax.tree.map(lambda positive, away: jnp.concatenate([positive, away]), conditioning, negative)

    def evaluate_both(latents: Array, timestep: Array, _: Any) -> Array:
        stacked = velocity(jnp.concatenate([latents, latents]), jnp.concatenate([timestep, timestep]), both)
        positive, away = jnp.split(stacked.astype(jnp.float32), 2)
        return away + guidance * (positive - away)

    return evaluate_both


def add_noise(clean: Float[Array, "b ..."], noise: Float[Array, "b ..."], sigma: Sigma) -> Float[Array, "b ..."]:
    """`x_sigma = (1 - sigma) clean + sigma noise`."""
    level = per_row(sigma, clean)
    return (1 - level) * clean + level * noise


def clean_estimate(
    latents: Float[Array, "b ..."], velocity: Float[Array, "b ..."], sigma: Sigma
) -> Float[Array, "b ..."]:
    """`x_sigma - sigma velocity`: where the straight line from the latents ends."""
    return latents - per_row(sigma, latents) * velocity


def move(
    latents: Float[Array, "b ..."], velocity: Float[Array, "b ..."], sigma: Sigma, following: Sigma
) -> Float[Array, "b ..."]:
    """One Euler step along a velocity, from `sigma` to `following`."""
    return latents + (per_row(following, latents) - per_row(sigma, latents)) * velocity


def rollout(
    velocity: Velocity,
    latents: Float[Array, "b ..."],
    sigmas: Float[Array, " steps+1"],
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    conditioning: Any,
) -> Float[Array, "b ..."]:
    """Latents at `sigmas[start]` to latents at `sigmas[stop]` by Euler steps; both may be values that JAX traces.

    It is meant for points that no gradient passes through: JAX cannot differentiate it in reverse.
    """

    def step(index: Array, latents: Array) -> Array:
        return move(latents, evaluate(velocity, latents, sigmas[index], conditioning), sigmas[index], sigmas[index + 1])

    return jax.lax.fori_loop(start, stop, step, latents)


def per_row(sigma: Sigma, latents: Float[Array, "b ..."]) -> Array:
    """A sigma shaped to multiply latents."""
    level = jnp.asarray(sigma, jnp.float32)
    return level.reshape(level.shape + (1,) * (latents.ndim - 1)) if level.ndim else level
