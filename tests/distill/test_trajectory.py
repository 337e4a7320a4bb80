import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35flash_jax.distill.flow import evaluate, guided, rollout
from sd35flash_jax.distill.trajectory import (
    own_points,
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
    assert (np.diff(levels) < 0).all() and 33 <= len(levels) <= 33 + steps
    np.testing.assert_array_equal(levels[indices], student)


@given(
    student=st.lists(st.floats(2**-6, 1 - 2**-6, width=32), max_size=4, unique=True),
    steps=st.integers(1, 50),
    shift=st.floats(0.5, 8.0),
)
def test_no_step_beside_a_students_level_is_much_shorter_than_the_teachers(student, steps, shift):
    student, teacher = np.array([1.0, *sorted(student, reverse=True), 0.0]), shifted_sigmas(steps, shift)
    levels, indices = teacher_sigmas(student, teacher)
    np.testing.assert_array_equal(levels[indices], np.float32(student))
    own = np.setdiff1d(levels, np.float32(student))
    assert np.isin(own, np.float32(teacher)).all()
    for level in own:
        at = np.flatnonzero(np.float32(teacher) == level)[0]
        shorter = min(teacher[at - 1] - teacher[at], teacher[at] - teacher[at + 1])
        assert np.abs(student - level).min() > 0.49 * shorter


def test_a_trajectory_is_the_teachers_steps_of_adams_and_bashforth_at_the_students_levels(draw):
    teacher, conditioning = random_mlp(1), draw.standard_normal((3, 3))
    noise = draw.standard_normal((3, 2))
    levels, indices = teacher_sigmas(np.array(SIGMAS[2]), np.linspace(1, 0, 8))
    points = adams_bashforth(teacher, noise, levels, conditioning, SIGMAS[2])
    trajectory = synthesize_trajectory(mlp(teacher), jnp.array(noise), levels, indices, conditioning)
    np.testing.assert_allclose(trajectory, points, atol=1e-5)


def adams_bashforth(teacher, noise, levels, conditioning, kept):
    """The points at the levels that are kept: the straight line through the last two velocities is integrated."""
    latents, points, known = noise, [noise], []
    for sigma, following in zip(levels.astype(float), levels[1:].astype(float)):
        known.append((sigma, numpy_mlp(teacher)(latents, sigma, conditioning)))
        (earlier, then), (_, now) = known[-2:] if len(known) > 1 else [(sigma + 1, known[0][1]), *known]
        middle = now + (now - then) / (sigma - earlier) * ((sigma + following) / 2 - sigma)
        latents = latents + (following - sigma) * middle
        if following in kept:
            points.append(latents)
    return points


def test_twice_as_many_steps_are_four_times_as_exact(draw):
    teacher, conditioning = random_mlp(1), jnp.array(draw.standard_normal((20, 3)))
    noise = jnp.array(draw.standard_normal((20, 2)))

    def end(steps):
        levels, indices = teacher_sigmas(np.array(SIGMAS[4]), shifted_sigmas(steps, 2.0))
        return np.asarray(synthesize_trajectory(mlp(teacher), noise, levels, indices, conditioning)[-1])

    coarse, fine = (np.abs(end(steps) - end(640)).mean() for steps in (20, 40))
    assert coarse / fine > 3


@pytest.mark.parametrize("steps", [4, 1])
def test_the_teacher_goes_on_from_each_point_of_the_students_own_trajectory(steps, draw):
    student, teacher = random_mlp(2), random_mlp(1)
    conditioning, latents = draw.standard_normal((3, 3)), draw.standard_normal((3, 2))
    levels, indices = teacher_sigmas(np.array(SIGMAS[steps]), shifted_sigmas(7, 2.0))
    points, ends = own_points(mlp(student), mlp(teacher), jnp.array(latents), levels, indices, conditioning)
    assert len(points) == len(ends) == steps
    for k, (start, stop) in enumerate(zip(indices, indices[1:])):
        np.testing.assert_allclose(points[k], latents, atol=1e-5)
        _, end = adams_bashforth(teacher, latents, levels[start : stop + 1], conditioning, [levels[stop]])
        np.testing.assert_allclose(ends[k], end, atol=1e-5)
        latents = latents + (levels[stop] - levels[start]) * numpy_mlp(student)(latents, levels[start], conditioning)


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
