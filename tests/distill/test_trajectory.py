import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.distill.flow import evaluate, guided, rollout
from sd35flash_jax.distill.trajectory import (
    synthesize_trajectory,
    teacher_sigmas,
    trajectory_guidance_loss,
    whole_trajectory_loss,
)
from sd35flash_jax.schedule import shifted_sigmas
from tests.distill.networks import assert_same_gradients, is_zero, mlp, numeric_gradient, numpy_mlp, random_mlp

SIGMAS = {4: [1.0, 0.75, 0.5, 0.25, 0.0], 2: [1.0, 0.5, 0.0], 1: [1.0, 0.0]}


@pytest.fixture
def draw():
    return np.random.default_rng(0)


@pytest.mark.parametrize("steps", [4, 2, 1])
def test_the_teachers_levels_hold_the_students(steps):
    student = np.array(SIGMAS[steps], np.float32)
    levels, indices = teacher_sigmas(student, shifted_sigmas(32, 3.0))
    assert (np.diff(levels) < 0).all() and len(levels) <= 33 + steps
    np.testing.assert_array_equal(levels[indices], student)


def test_a_trajectory_is_the_teachers_euler_steps_at_the_students_levels(draw):
    teacher, conditioning = random_mlp(1), draw.standard_normal((3, 3))
    noise = draw.standard_normal((3, 2))
    levels, indices = teacher_sigmas(np.array(SIGMAS[2]), np.linspace(1, 0, 8))
    latents, points = noise, [noise]
    for sigma, following in zip(levels, levels[1:]):
        latents = latents + (following - sigma) * numpy_mlp(teacher)(latents, sigma, conditioning)
        if following in SIGMAS[2]:
            points.append(latents)
    trajectory = synthesize_trajectory(mlp(teacher), jnp.array(noise), levels, indices, conditioning)
    np.testing.assert_allclose(trajectory, points, atol=1e-5)


def test_guidance_moves_the_velocity_away_from_the_negative_one(draw):
    teacher, latents = random_mlp(1), draw.standard_normal((3, 2))
    positive, negative = draw.standard_normal((2, 3, 3))
    towards, away = (numpy_mlp(teacher)(latents, 0.3, conditioning) for conditioning in (positive, negative))
    for guidance in (1.0, 4.0):
        velocity = guided(mlp(teacher), positive, negative, guidance)
        expected = away + guidance * (towards - away)
        np.testing.assert_allclose(evaluate(velocity, latents, 0.3, None), expected, rtol=1e-5, atol=1e-5)


def test_the_loss_of_whole_trajectories_is_the_mean_over_all_their_steps(draw):
    student, conditioning = random_mlp(2), draw.standard_normal((3, 3))
    trajectory, sigmas = draw.standard_normal((5, 3, 2)), SIGMAS[4]
    errors = [
        numpy_mlp(student)(here, sigma, conditioning) - (there - here) / (following - sigma)
        for here, there, sigma, following in zip(trajectory, trajectory[1:], sigmas, sigmas[1:])
    ]
    loss = whole_trajectory_loss(mlp(student), jnp.array(trajectory), jnp.array(sigmas), conditioning)
    np.testing.assert_allclose(loss, np.square(errors).mean(), rtol=1e-4)


@pytest.mark.parametrize("steps", [4, 2, 1])
def test_the_gradient_of_trajectory_guidance_is_that_of_its_literal_twin(steps, draw):
    sigmas, student = np.array(SIGMAS[steps]), random_mlp(2)
    trajectory, conditioning = draw.standard_normal((steps + 1, 6, 2)), draw.standard_normal((6, 3))
    index = draw.integers(0, steps, 6)

    def twin(params):
        total = 0.0
        for row, k in enumerate(index):
            chord = (trajectory[k + 1, row] - trajectory[k, row]) / (sigmas[k + 1] - sigmas[k])
            velocity = numpy_mlp(params)(trajectory[k, row][None], sigmas[k], conditioning[row][None])[0]
            total += ((velocity - chord) ** 2).sum()
        return total / trajectory[0].size

    def loss(params):
        return trajectory_guidance_loss(mlp(params), jnp.array(trajectory), sigmas, jnp.array(index), conditioning)

    assert float(loss(student)) == pytest.approx(twin(student), rel=1e-5)
    assert_same_gradients(jax.grad(loss)(student), numeric_gradient(twin, student))


def test_the_teachers_trajectory_is_a_constant_of_the_students_target(draw):
    trajectory = jnp.array(draw.standard_normal((3, 4, 2)))

    def loss(end):
        points = trajectory.at[-1].set(end)
        index = jnp.ones(4, int)
        return trajectory_guidance_loss(mlp(random_mlp(2)), points, np.array(SIGMAS[2]), index, jnp.zeros((4, 3)))

    assert is_zero(jax.grad(loss)(trajectory[-1]))


def test_a_student_on_the_teachers_chords_has_no_loss_and_lands_on_the_teachers_points(draw):
    sigmas, trajectory = np.array(SIGMAS[4]), jnp.array(draw.standard_normal((5, 3, 2)))
    chords = jnp.diff(trajectory, axis=0) / jnp.diff(jnp.array(sigmas))[:, None, None]

    def student(latents, timestep, _):
        index = jnp.argmin(abs(sigmas[:, None] * 1000 - timestep), axis=0)
        return chords[index, jnp.arange(3)]

    for k in range(4):
        assert float(trajectory_guidance_loss(student, trajectory, sigmas, jnp.full(3, k), None)) < 1e-12
    np.testing.assert_allclose(
        rollout(student, trajectory[0], jnp.array(sigmas), 0, 4, None), trajectory[-1], atol=1e-5
    )
