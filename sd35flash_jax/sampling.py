"""velocity -> latents: guided Euler steps along the rectified flow.

Two compiled programs serve every step count, sigma list and guidance: `modulations` prepares what depends on timestep
and pooled text alone, a few steps at a time, and `add_velocity` evaluates the transformer once. An Euler step adds the
velocity to the latents once, or twice with guidance; the device is kept busy, since the host only queues the calls.
What recompiles is a new batch, height, width, token count or dtype.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int

from sd35flash_jax.frozen import Frozen
from sd35flash_jax.kept_programs import kept
from sd35flash_jax.models.mmdit import MMDiT, Modulation
from sd35flash_jax.schedule import TRAIN_TIMESTEPS
from sd35flash_jax.text import Conditioning

# Modulation is a matrix product of few rows, as slow as the reading of its weights: a few steps' rows take no longer.
STEPS_MODULATED = 4

with contextlib.suppress(ValueError):  # Registered already, where this module is loaded again.
    export.register_namedtuple_serialization(Modulation, serialized_name="sd35flash_jax.Modulation")


@jax.jit
@kept
def modulations(
    transformer: Frozen[MMDiT], timesteps: Float[Array, "steps b"], pooled: Float[Array, "b p"]
) -> Modulation:
    """`MMDiT.modulate` at each of `STEPS_MODULATED` timesteps in [0, 1000], a step's rows after another's."""
    return transformer.module.modulate(timesteps.reshape(-1), jnp.tile(pooled, (len(timesteps), 1)))


@jax.jit
@kept
def add_velocity(
    transformer: Frozen[MMDiT],
    latents: Float[Array, "b h w c"],
    modulation: Modulation,
    first: Int[Array, ""],
    context: Float[Array, "b t c"],
    weight: Float[Array, ""],
    total: Float[Array, "b h w c"],
) -> Float[Array, "b h w c"]:
    """`total + weight * velocity`, float32: one evaluation of the transformer, with the rows of a modulation from
    `first` on."""
    return total + weight * transformer.module.predict(latents, context, modulation, first).astype(jnp.float32)


@jax.jit
def velocity(
    transformer: Frozen[MMDiT],
    latents: Float[Array, "b h w c"],
    timestep: Float[Array, " b"],
    conditioning: Conditioning,
) -> Float[Array, "b h w c"]:
    """One evaluation of the transformer by itself, as float32: one program, so that a single call waits for one."""
    return transformer.module(latents, timestep, conditioning.context, conditioning.pooled).astype(jnp.float32)


def denoise(
    transformer: Frozen[MMDiT],
    noise: Float[Array, "b h w c"],
    conditioning: Conditioning,
    negative: Conditioning,
    sigmas: Float[np.ndarray, " steps+1"],
    guidance: float,
    on_step: Callable[[], object] | None = None,
) -> Float[Array, "b h w c"]:
    """Denoise model-scale noise at `sigmas[0]` to latents at `sigmas[-1]`, float32, with a call of `on_step` after each
    step.

    Above a guidance of 1 the velocity is `negative + guidance * (positive - negative)` (arXiv 2207.12598), taken as a
    weighted sum; up to 1 only the positive one is evaluated.
    """
    terms = [(conditioning, guidance), (negative, 1 - guidance)] if guidance > 1 else [(conditioning, 1.0)]
    prepared = zip(*(_by_step(transformer, sigmas[:-1], given.pooled) for given, _ in terms))
    latents = noise
    for change, vectors in zip(np.diff(sigmas), prepared):
        total = latents
        for (given, weight), (modulation, first) in zip(terms, vectors):
            scale = np.float32(weight * change)
            total = add_velocity(transformer, latents, modulation, first, given.context, scale, total)
        latents = total
        if on_step is not None:
            latents.block_until_ready()
            on_step()
    return latents


def _by_step(
    transformer: Frozen[MMDiT], sigmas: Float[np.ndarray, " steps"], pooled: Float[Array, "b p"]
) -> Iterator[tuple[Modulation, np.int32]]:
    """For each step a modulation and its first row there; steps beyond the last fill the last group up."""
    filled = np.pad(sigmas, (0, -len(sigmas) % STEPS_MODULATED), mode="edge").astype(np.float32) * TRAIN_TIMESTEPS
    for group in filled.reshape(-1, STEPS_MODULATED):
        timesteps = np.repeat(group[:, None], len(pooled), axis=1)
        modulation = modulations(transformer, timesteps, pooled)
        yield from ((modulation, np.int32(step * len(pooled))) for step in range(STEPS_MODULATED))
