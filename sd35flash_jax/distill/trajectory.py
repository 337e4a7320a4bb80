"""Stage (a), trajectory guidance: the student learns to jump between points of the teacher's guided trajectory.

Source: SD3.5-Flash (arXiv 2509.21318); the straight jump between two points of an ODE's trajectory is that of
rectified flow (arXiv 2209.03003) and of its piecewise form (PeRFlow, arXiv 2405.07510). Jumps from the points that
the student itself reaches, where the teacher says how to go on, are learning from an expert's corrections (DAgger,
arXiv 1011.0686), as pi-Flow (arXiv 2510.14974) does for policies that are velocities.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sd35flash_jax.distill.flow import Velocity, evaluate, move, per_row


def teacher_sigmas(student: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's noise levels with the student's among them.

    Args:
        student: `(student steps + 1,)`, falling to 0.
        teacher: `(teacher steps + 1,)`, falling to 0.

    Returns:
        The student's levels and those of the teacher that are not close to one of them, falling, and the index of each
        of the student's. Close is less than half a step of the teacher's: a step much shorter than the next is nothing
        to extrapolate from.
    """
    steps = -np.diff(teacher)
    shorter = np.minimum(np.append(steps, np.inf), np.append(np.inf, steps))
    apart = np.abs(np.subtract.outer(teacher, student)).min(axis=1) > shorter / 2
    levels = np.union1d(student, np.asarray(teacher)[apart]).astype(np.float32)[::-1]
    return levels, np.searchsorted(-levels, -np.asarray(student, np.float32))


def synthesize_trajectory(
    teacher: Velocity,
    noise: Float[Array, "b ..."],
    sigmas: Float[Array, " n+1"],
    indices: Int[np.ndarray, " k+1"],
    conditioning: Any,
) -> Float[Array, "k+1 b ..."]:
    """The teacher's trajectory by `n` steps of the second order (Adams-Bashforth: the velocity is taken to change as it
    did since the step before), at the student's levels alone. The first is an Euler step.

        x_(i+1) = x_i + h_i (v_i + (v_i - v_(i-1)) h_i / (2 h_(i-1)))
        v_i = v_teacher(x_i, sigma_i),  h_i = sigma_(i+1) - sigma_i

    Args:
        teacher: the teacher's velocity, guided where guidance is wanted.
        noise: the first point, at `sigmas[0]`.
        sigmas: the teacher's levels, as `teacher_sigmas` gives them.
        indices: which of them are the student's.
        conditioning: of the teacher.
    """

    sigmas, changes = jnp.asarray(sigmas), _changes(sigmas, afresh=np.array([0]))
    state, points = (noise, jnp.zeros_like(noise)), [noise]
    for start, stop in zip(indices, indices[1:]):
        state = _follow(teacher, state, sigmas, changes, start, stop, conditioning)
        points.append(state[0])
    return jnp.stack(points)


def own_points(
    student: Velocity,
    teacher: Velocity,
    noise: Float[Array, "b ..."],
    sigmas: Float[Array, " n+1"],
    indices: Int[np.ndarray, " k+1"],
    conditioning: Any,
) -> tuple[Float[Array, "k b ..."], Float[Array, "k b ..."]]:
    """The points from which the student takes its steps, on its own trajectory from noise, and where the teacher comes
    to from each of them at the student's next level, by steps as in `synthesize_trajectory`, begun anew at each point.

    Args:
        student: the student's velocity.
        teacher: the teacher's velocity, guided where guidance is wanted.
        noise: the first point, at `sigmas[0]`.
        sigmas: the teacher's levels, as `teacher_sigmas` gives them.
        indices: which of them are the student's.
        conditioning: of the student, and of a teacher that does not bring its own.
    """
    sigmas, changes = jnp.asarray(sigmas), _changes(sigmas, afresh=indices[:-1])

    def step(latents: Array, bounds: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        start, stop = bounds
        end, _ = _follow(teacher, (latents, jnp.zeros_like(latents)), sigmas, changes, start, stop, conditioning)
        velocity = evaluate(student, latents, sigmas[start], conditioning)
        return move(latents, velocity, sigmas[start], sigmas[stop]), (latents, end)

    _, (points, ends) = jax.lax.scan(step, noise, (jnp.array(indices[:-1]), jnp.array(indices[1:])))
    return points, ends


def trajectory_guidance_loss(
    student: Velocity,
    trajectory: Float[Array, "k+1 b ..."],
    sigmas: Float[Array, " k+1"],
    index: Int[Array, " b"],
    conditioning: Any,
) -> Float[Array, ""]:
    """The student's velocity at a teacher's point is the straight line to the teacher's next point.

        L = E | v_student(x_k, sigma_k) - (x_(k+1) - x_k) / (sigma_(k+1) - sigma_k) |^2

    Args:
        student: the student's velocity.
        trajectory: the teacher's points at `sigmas`; a constant.
        sigmas: the student's levels, falling to 0.
        index: which step `k` each row of the batch learns.
        conditioning: of the student.
    """
    sigmas = jnp.asarray(sigmas)
    rows = jnp.arange(trajectory.shape[1])
    here, there = trajectory[index, rows], trajectory[index + 1, rows]
    return chord_loss(student, here, there, sigmas[index], sigmas[index + 1], conditioning)


def chord_loss(
    student: Velocity,
    here: Float[Array, "b ..."],
    there: Float[Array, "b ..."],
    sigma: Float[Array, " b"],
    following: Float[Array, " b"],
    conditioning: Any,
) -> Float[Array, ""]:
    """The student's velocity here is the straight line from here, at `sigma`, to there, at `following`; both are
    constants.

    L = E | v_student(here, sigma) - (there - here) / (following - sigma) |^2
    """
    chord = (there - here) / per_row(following - sigma, here)
    error = evaluate(student, here, sigma, conditioning) - jax.lax.stop_gradient(chord)
    return jnp.mean(jnp.square(error))


def whole_trajectory_loss(
    student: Velocity, trajectory: Float[Array, "k+1 b ..."], sigmas: Float[Array, " k+1"], conditioning: Any
) -> Float[Array, ""]:
    """The mean of `trajectory_guidance_loss` over all steps: what it is of random ones, on average."""

    def of_step(step: Array) -> Array:
        return trajectory_guidance_loss(student, trajectory, sigmas, jnp.full(trajectory.shape[1], step), conditioning)

    return jax.lax.map(of_step, jnp.arange(len(trajectory) - 1)).mean()


def _changes(sigmas: Float[Array, " n+1"], afresh: Int[np.ndarray, " starts"]) -> Float[Array, " n"]:
    """By how much of the change since the step before a velocity is extrapolated: by none where it starts afresh."""
    lengths = jnp.diff(jnp.asarray(sigmas))
    return jnp.concatenate([jnp.zeros(1), lengths[1:] / (2 * lengths[:-1])]).at[afresh].set(0)


def _follow(
    teacher: Velocity,
    state: tuple[Float[Array, "b ..."], Float[Array, "b ..."]],
    sigmas: Float[Array, " n+1"],
    changes: Float[Array, " n"],
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    conditioning: Any,
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Latents at `sigmas[start]`, and the velocity of the step before, to those at `sigmas[stop]`."""

    def step(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        latents, earlier = state
        velocity = evaluate(teacher, latents, sigmas[index], conditioning)
        extrapolated = velocity + changes[index] * (velocity - earlier)
        return move(latents, extrapolated, sigmas[index], sigmas[index + 1]), velocity

    return jax.lax.fori_loop(start, stop, step, state)
