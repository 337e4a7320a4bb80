"""Stage (b), distribution matching: the student's samples are moved to where the teacher finds them more likely than
the proxy, the score network of the student's own distribution, does.

    gradient of KL(student || teacher) at x_sigma  =  s_proxy - s_teacher
                                                   =  (1 - sigma) / sigma^2 (clean_proxy - clean_teacher)

where `s` is a score and `clean = x_sigma - sigma v` the clean estimate that belongs to it (DMD, arXiv 2311.18828).
DMD and DMD2 (arXiv 2405.14867) draw the noise level at random and re-noise the student's clean estimate to it.
SD3.5-Flash (arXiv 2509.21318) shares the timesteps: both scores are taken at the points that the student's own
trajectory passes, at their own noise levels, and no fresh noise is added. Decoupled DMD (arXiv 2511.22677) takes the
teacher's guidance apart from the matching and gives it a noise level of its own.

Every function here takes networks as velocities. Teacher and proxy are constants to the student's losses, and the
student's samples are constants to the proxy's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd35flash_jax.distill.flow import (
    Sigma,
    Velocity,
    add_noise,
    clean_estimate,
    evaluate,
    guided,
    move,
    per_row,
)


def shared_sigmas(sigmas: np.ndarray, end: float) -> np.ndarray:
    """The noise level at which the point that each step arrives at is matched, `(steps,)`.

    That is the step's own next level. The last step arrives at 0, where there is no score; its straight line is
    matched a little before its end: at `end`, or halfway where the last step is shorter than that. (The published
    four-step spacing, 1.0 0.8577 0.6022 0.0089, brings such a level itself.)
    """
    levels = np.array(sigmas[1:], np.float32)
    levels[-1] = min(end, sigmas[-2] / 2)
    return levels


def student_point(
    student: Velocity, latents: Float[Array, "b ..."], sigma: Sigma, following: Sigma, conditioning: Any
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """One differentiable step of the student from a point of its trajectory, which is a constant.

    Returns:
        The point of the step's straight line at `following`, and the line's clean end.
    """
    latents = jax.lax.stop_gradient(latents)
    velocity = evaluate(student, latents, sigma, conditioning)
    return move(latents, velocity, sigma, following), clean_estimate(latents, velocity, sigma)


def matching_direction(
    teacher: Velocity,
    proxy: Velocity,
    point: Float[Array, "b ..."],
    sigma: Sigma,
    clean: Float[Array, "b ..."],
    conditioning: Any,
) -> Float[Array, "b ..."]:
    """Where the student's distribution is too dense, as a step to take back (DMD):

        (clean_proxy - clean_teacher) / mean |clean_student - clean_teacher|

    both at `(point, sigma)`. The mean runs over each sample, and makes steps of all noise levels equally long.

    Args:
        teacher: the teacher's velocity, guided or not.
        proxy: the proxy's velocity.
        point: where the scores are compared.
        sigma: its noise level.
        clean: the student's clean estimate.
        conditioning: of teacher and proxy.
    """
    point, clean = jax.lax.stop_gradient((point, clean))
    by_teacher = clean_estimate(point, evaluate(teacher, point, sigma, conditioning), sigma)
    by_proxy = clean_estimate(point, evaluate(proxy, point, sigma, conditioning), sigma)
    return jax.lax.stop_gradient(by_proxy - by_teacher) / _distance(clean, by_teacher)


def guidance_direction(
    teacher: Velocity,
    point: Float[Array, "b ..."],
    sigma: Sigma,
    clean: Float[Array, "b ..."],
    conditioning: Any,
    negative: Any,
    guidance: float,
) -> Float[Array, "b ..."]:
    """The guidance-augmentation term of Decoupled DMD: the matching of the guided teacher against the plain one.

        (clean_conditional - clean_guided) / mean |clean_student - clean_guided|

    where `clean_conditional - clean_guided = sigma (guidance - 1) (v_positive - v_negative)`.
    """
    strong = guided(teacher, conditioning, negative, guidance)
    return matching_direction(strong, teacher, point, sigma, clean, conditioning)


def directed_loss(samples: Float[Array, "b ..."], direction: Float[Array, "b ..."]) -> Float[Array, ""]:
    """The loss whose gradient with respect to each sample is its direction, over the batch size and sample size:

    L = 1/2 mean | samples - constant(samples - direction) |^2
    """
    target = jax.lax.stop_gradient(samples - direction)
    return 0.5 * jnp.mean(jnp.square(samples - target))


def renoise(
    clean: Float[Array, "b ..."], low: Sigma, high: Sigma, key: Array
) -> tuple[Float[Array, "b ..."], Float[Array, " b"]]:
    """DMD2's points of comparison: clean samples with fresh noise, at levels drawn evenly from [low, high]."""
    level_key, noise_key = jax.random.split(key)
    sigma = jax.random.uniform(level_key, clean.shape[:1], minval=low, maxval=high)
    return add_noise(clean, jax.random.normal(noise_key, clean.shape), sigma), sigma


def proxy_loss(
    proxy: Velocity,
    samples: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    sigma: Float[Array, " b"],
    conditioning: Any,
) -> Float[Array, ""]:
    """Flow matching on the student's samples (arXiv 2210.02747), which makes the proxy the student's score network:

    L = E | v_proxy(x_sigma, sigma) - (noise - samples) |^2
    """
    samples = jax.lax.stop_gradient(samples)
    error = evaluate(proxy, add_noise(samples, noise, sigma), sigma, conditioning) - (noise - samples)
    return jnp.mean(jnp.square(error))


def _distance(clean: Float[Array, "b ..."], estimate: Float[Array, "b ..."]) -> Array:
    """The mean absolute difference of each sample, kept off zero and shaped to divide latents."""
    distance = jnp.abs(clean - estimate).reshape(len(clean), -1).mean(axis=1)
    return per_row(jax.lax.stop_gradient(jnp.maximum(distance, 1e-4)), clean)
