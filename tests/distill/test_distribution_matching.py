import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.distill.distribution_matching import (
    directed_loss,
    guidance_direction,
    matching_direction,
    proxy_loss,
    renoise,
    shared_sigmas,
    student_point,
)
from tests.distill.networks import assert_same_gradients, is_zero, mlp, numeric_gradient, numpy_mlp, random_mlp

STUDENT, TEACHER, PROXY = (random_mlp(seed) for seed in (1, 2, 3))
SIGMA, FOLLOWING, GUIDANCE = 0.75, 0.5, 3.0


@pytest.fixture
def draw():
    return np.random.default_rng(0)


@pytest.fixture
def latents(draw):
    return draw.standard_normal((6, 2))


@pytest.fixture
def conditioning(draw):
    return draw.standard_normal((6, 3))


def literal_direction(point, sigma, clean, conditioning):
    by_teacher = point - sigma * numpy_mlp(TEACHER)(point, sigma, conditioning)
    by_proxy = point - sigma * numpy_mlp(PROXY)(point, sigma, conditioning)
    return (by_proxy - by_teacher) / np.abs(clean - by_teacher).mean(axis=1, keepdims=True)


def test_the_gradient_of_shared_timestep_matching_is_that_of_its_literal_twin(latents, conditioning):
    def loss(params):
        point, clean = student_point(mlp(params), latents, SIGMA, FOLLOWING, conditioning)
        direction = matching_direction(mlp(TEACHER), mlp(PROXY), point, FOLLOWING, clean, conditioning)
        return directed_loss(point, direction)

    def points(params):
        velocity = numpy_mlp(params)(latents, SIGMA, conditioning)
        return latents + (FOLLOWING - SIGMA) * velocity, latents - SIGMA * velocity

    point, clean = points(STUDENT)
    direction = literal_direction(point, FOLLOWING, clean, conditioning)
    assert float(loss(STUDENT)) == pytest.approx(0.5 * np.square(direction).mean(), rel=1e-4)
    by_hand = numeric_gradient(lambda params: (points(params)[0] * direction).sum() / direction.size, STUDENT)
    assert_same_gradients(jax.grad(loss)(STUDENT), by_hand)


def test_the_gradient_of_renoised_matching_is_that_of_its_literal_twin(latents, conditioning):
    key = jax.random.key(0)

    def loss(params):
        _, clean = student_point(mlp(params), latents, SIGMA, FOLLOWING, conditioning)
        point, sigma = renoise(clean, 0.02, 0.98, key)
        return directed_loss(clean, matching_direction(mlp(TEACHER), mlp(PROXY), point, sigma, clean, conditioning))

    def clean_of(params):
        return latents - SIGMA * numpy_mlp(params)(latents, SIGMA, conditioning)

    clean = clean_of(STUDENT)
    _, sigma = renoise(jnp.zeros((6, 2)), 0.02, 0.98, key)
    noise = renoise(jnp.zeros((6, 2)), 0.02, 0.98, key)[0] / sigma[:, None]
    level = np.array(sigma, float)[:, None]
    point = (1 - level) * clean + level * np.array(noise, float)
    by_teacher = point - level * numpy_mlp(TEACHER)(point, sigma, conditioning)
    by_proxy = point - level * numpy_mlp(PROXY)(point, sigma, conditioning)
    direction = (by_proxy - by_teacher) / np.abs(clean - by_teacher).mean(axis=1, keepdims=True)
    by_hand = numeric_gradient(lambda params: (clean_of(params) * direction).sum() / direction.size, STUDENT)
    assert_same_gradients(jax.grad(loss)(STUDENT), by_hand)


def test_the_gradient_of_the_proxys_flow_matching_is_that_of_its_literal_twin(latents, conditioning, draw):
    noise, sigma = draw.standard_normal((6, 2)), draw.uniform(0.1, 0.9, 6)

    def twin(params):
        noisy = (1 - sigma[:, None]) * latents + sigma[:, None] * noise
        return np.square(numpy_mlp(params)(noisy, sigma, conditioning) - (noise - latents)).mean()

    gradient = jax.grad(lambda params: proxy_loss(mlp(params), latents, noise, jnp.array(sigma), conditioning))(PROXY)
    assert_same_gradients(gradient, numeric_gradient(twin, PROXY))


def test_the_guidance_term_is_what_guidance_adds_to_the_clean_estimate(latents, conditioning, draw):
    negative, clean = draw.standard_normal((6, 3)), draw.standard_normal((6, 2))
    towards, away = (numpy_mlp(TEACHER)(latents, 0.4, c) for c in (conditioning, negative))
    guided_clean = latents - 0.4 * (away + GUIDANCE * (towards - away))
    expected = 0.4 * (GUIDANCE - 1) * (towards - away) / np.abs(clean - guided_clean).mean(axis=1, keepdims=True)
    direction = guidance_direction(mlp(TEACHER), latents, 0.4, clean, conditioning, negative, GUIDANCE)
    np.testing.assert_allclose(direction, expected, rtol=1e-4, atol=1e-5)
    assert is_zero(guidance_direction(mlp(TEACHER), latents, 0.4, clean, conditioning, negative, 1.0))


def test_no_gradient_reaches_the_point_where_the_step_starts(latents, conditioning):
    def loss(latents):
        return jnp.sum(student_point(mlp(STUDENT), latents, SIGMA, FOLLOWING, conditioning)[0])

    assert is_zero(jax.grad(loss)(jnp.array(latents)))


@pytest.mark.parametrize("argument", ["teacher", "proxy", "point", "clean"])
def test_a_direction_is_a_constant(argument, latents, conditioning, draw):
    arguments = {"teacher": TEACHER, "proxy": PROXY, "point": latents, "clean": draw.standard_normal((6, 2))}

    def total(value):
        given = arguments | {argument: value}
        teacher, proxy = mlp(given["teacher"]), mlp(given["proxy"])
        matched = matching_direction(teacher, proxy, given["point"], SIGMA, given["clean"], conditioning)
        augmented = guidance_direction(
            teacher, given["point"], SIGMA, given["clean"], conditioning, -conditioning, GUIDANCE
        )
        return matched.sum(), augmented.sum()

    for gradient in jax.jacrev(total)(jax.tree.map(jnp.array, arguments[argument])):
        assert is_zero(gradient)


def test_a_directed_loss_moves_samples_alone_and_by_their_direction(latents, draw):
    direction = draw.standard_normal((6, 2))
    to_samples, to_direction = jax.grad(directed_loss, argnums=(0, 1))(jnp.array(latents), jnp.array(direction))
    np.testing.assert_allclose(to_samples, direction / direction.size, atol=1e-6)
    assert is_zero(to_direction)


def test_the_students_samples_are_constants_of_the_proxys_loss(latents, conditioning):
    def loss(samples):
        return proxy_loss(mlp(PROXY), samples, jnp.ones((6, 2)), jnp.full(6, 0.5), conditioning)

    assert is_zero(jax.grad(loss)(jnp.array(latents)))


def test_points_are_matched_at_the_levels_where_the_students_steps_arrive():
    np.testing.assert_allclose(shared_sigmas(np.array([1, 0.75, 0.5, 0.25, 0]), 0.02), [0.75, 0.5, 0.25, 0.02])
    np.testing.assert_allclose(shared_sigmas(np.array([1, 0.5, 0]), 0.02), [0.5, 0.02])
    np.testing.assert_allclose(shared_sigmas(np.array([1, 0]), 0.02), [0.02])
    published = np.array([1, 0.8577, 0.6022, 0.0089, 0])
    np.testing.assert_allclose(shared_sigmas(published, 0.02), [0.8577, 0.6022, 0.0089, 0.00445], rtol=1e-6)


def test_renoising_draws_levels_evenly_and_noise_of_unit_variance():
    point, sigma = renoise(jnp.full((20000, 2), 5.0), 0.2, 0.8, jax.random.key(0))
    assert 0.2 <= sigma.min() < 0.21 and 0.79 < sigma.max() <= 0.8 and abs(sigma.mean() - 0.5) < 0.01
    noise = (point - (1 - sigma[:, None]) * 5) / sigma[:, None]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
